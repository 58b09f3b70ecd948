package p11

import (
	"crypto"
	"crypto/subtle"
	"encoding/binary"
)

// unpadOAEP removes the padding of RSAES-OAEP with an empty label and MGF1 over
// the same hash (RFC 8017, section 7.1.2, step 3) from the result of a raw RSA
// decryption for a modulus of size bytes. It says only whether it succeeded, and
// takes the same time whichever check fails: to tell "the first byte is not zero"
// from "the hash differs" would let a caller decrypt (Manger, CRYPTO 2001). The
// time depends on the length of the message, which the caller learns anyway.
//
// The way that leaves this to the token is CKM_RSA_PKCS_OAEP; see Quirks.RawOAEP.
func unpadOAEP(h crypto.Hash, block []byte, size int) ([]byte, bool) {
	n := h.Size()
	if len(block) > size || size < 2*n+2 {
		return nil, false
	}
	em := make([]byte, size) // a library may leave leading zeros out
	copy(em[size-len(block):], block)
	defer clear(em)

	seed, db := em[1:1+n], em[1+n:]
	mgf1XOR(seed, h, db)
	mgf1XOR(db, h, seed)

	good := subtle.ConstantTimeByteEq(em[0], 0)
	good &= subtle.ConstantTimeCompare(h.New().Sum(nil), db[:n])

	// The hash is followed by zeros, a one and the message.
	rest := db[n:]
	looking, start := 1, 0
	for i, b := range rest {
		one, zero := subtle.ConstantTimeByteEq(b, 1), subtle.ConstantTimeByteEq(b, 0)
		start = subtle.ConstantTimeSelect(looking&one, i+1, start)
		good &= 1 ^ (looking & (1 ^ one) & (1 ^ zero))
		looking &= 1 ^ one
	}
	if good&(1^looking) != 1 {
		return nil, false
	}
	return append([]byte{}, rest[start:]...), true
}

// mgf1XOR xors MGF1 of seed into out. RFC 8017, appendix B.2.1.
func mgf1XOR(out []byte, h crypto.Hash, seed []byte) {
	hash := h.New()
	var counter [4]byte
	for i := uint32(0); len(out) > 0; i++ {
		binary.BigEndian.PutUint32(counter[:], i)
		hash.Reset()
		hash.Write(seed)
		hash.Write(counter[:])
		n := subtle.XORBytes(out, out, hash.Sum(nil)[:min(len(out), hash.Size())])
		out = out[n:]
	}
}
