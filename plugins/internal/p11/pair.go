package p11

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"math/big"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

var (
	rsaTypes = []pluginproto.KeyType{pluginproto.RSA2048, pluginproto.RSA3072, pluginproto.RSA4096}
	ecTypes  = []pluginproto.KeyType{pluginproto.ECP256, pluginproto.ECP384, pluginproto.ECP521}
)

// pair runs a command with a key pair.
func (s *session) pair(cmd pluginproto.Command) (pluginproto.Result, error) {
	types := rsaTypes
	if cmd.Mech == pluginproto.ECDSA {
		types = ecTypes
	}
	k, err := s.use(cmd, types...)
	if err != nil {
		return pluginproto.Result{}, err
	}
	switch cmd.Op {
	case pluginproto.OpVerify:
		return pluginproto.Result{}, verify(k.pub, cmd)
	case pluginproto.OpDecrypt:
		return s.decryptOAEP(k, cmd)
	default:
		return s.sign(k, cmd)
	}
}

func (s *session) sign(k *cachedKey, cmd pluginproto.Command) (pluginproto.Result, error) {
	const op = "signing"
	h, err := hashOf(cmd.Hash)
	if err != nil {
		return pluginproto.Result{}, pluginproto.Errorf(pluginproto.ClassCaller, op, "%v", err)
	}
	var opts crypto.SignerOpts = h
	if cmd.Mech == pluginproto.RSAPSS {
		opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: h}
	}
	sig, err := k.signer.Sign(rand.Reader, cmd.Input, opts)
	if err != nil {
		return pluginproto.Result{}, s.fail(op, err)
	}
	if ec, ok := k.pub.(*ecdsa.PublicKey); ok {
		if sig, err = flatSignature(ec, sig); err != nil {
			return pluginproto.Result{}, pluginproto.Errorf(pluginproto.ClassMember, op, "%v", err)
		}
	}
	return pluginproto.Result{Output: sig}, nil
}

// flatSignature turns ASN.1 into r ‖ s, each as long as the curve's order.
func flatSignature(pub *ecdsa.PublicKey, der []byte) ([]byte, error) {
	var rs struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &rs); err != nil || len(rest) != 0 {
		return nil, errors.New("the token made a signature that cannot be read")
	}
	size := (pub.Params().N.BitLen() + 7) / 8
	if rs.R.Sign() <= 0 || rs.S.Sign() <= 0 || rs.R.BitLen() > 8*size || rs.S.BitLen() > 8*size {
		return nil, errors.New("the token made a signature with numbers out of range")
	}
	out := make([]byte, 2*size)
	rs.R.FillBytes(out[:size])
	rs.S.FillBytes(out[size:])
	return out, nil
}

// verify checks a signature with the public half that was read from the token.
// There is no secret in it, so the token need not be asked.
func verify(pub crypto.PublicKey, cmd pluginproto.Command) error {
	h, err := hashOf(cmd.Hash)
	if err != nil {
		return pluginproto.Errorf(pluginproto.ClassCaller, opName(cmd.Op), "%v", err)
	}
	ok := false
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		size := (pub.Params().N.BitLen() + 7) / 8
		if len(cmd.Signature) == 2*size {
			r, s := new(big.Int).SetBytes(cmd.Signature[:size]), new(big.Int).SetBytes(cmd.Signature[size:])
			ok = ecdsa.Verify(pub, cmd.Input, r, s)
		}
	case *rsa.PublicKey:
		if cmd.Mech == pluginproto.RSAPSS {
			ok = rsa.VerifyPSS(pub, h, cmd.Input, cmd.Signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		} else {
			ok = rsa.VerifyPKCS1v15(pub, h, cmd.Input, cmd.Signature) == nil
		}
	}
	if !ok {
		return signatureInvalid()
	}
	return nil
}

func (s *session) decryptOAEP(k *cachedKey, cmd pluginproto.Command) (pluginproto.Result, error) {
	const op = "decrypting"
	pub, isRSA := k.pub.(*rsa.PublicKey)
	h, err := hashOf(cmd.Hash)
	if err != nil || !isRSA {
		return pluginproto.Result{}, pluginproto.Errorf(pluginproto.ClassCaller, op, "there is no OAEP with hash %d for this key", cmd.Hash)
	}
	invalid := &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: pluginproto.CKREncryptedDataInvalid, Op: op,
		Msg: "the ciphertext is not one for this key and hash"}
	// A number that is not below the modulus is refused by every library, each
	// with a return value of its own.
	if len(cmd.Input) != pub.Size() || new(big.Int).SetBytes(cmd.Input).Cmp(pub.N) >= 0 {
		return pluginproto.Result{}, invalid
	}
	if s.d.quirks.RawOAEP {
		block, err := s.rawRSA(k, cmd.Input)
		if err != nil {
			return pluginproto.Result{}, s.fail(op, err)
		}
		defer clear(block)
		out, ok := unpadOAEP(h, block, pub.Size())
		if !ok {
			return pluginproto.Result{}, invalid
		}
		return pluginproto.Result{Output: out}, nil
	}
	dec, ok := k.signer.(crypto.Decrypter)
	if !ok {
		return pluginproto.Result{}, pluginproto.Errorf(pluginproto.ClassCaller, op, "this key does not decrypt")
	}
	out, err := dec.Decrypt(rand.Reader, cmd.Input, &rsa.OAEPOptions{Hash: h})
	if err == nil {
		return pluginproto.Result{Output: out}, nil
	}
	if ckr, _ := ckrOf(err); ckr == pkcs11.CKR_ENCRYPTED_DATA_INVALID || ckr == pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE {
		return pluginproto.Result{}, invalid
	}
	return pluginproto.Result{}, s.fail(op, err)
}

// rawRSA computes the private operation without any padding.
func (s *session) rawRSA(k *cachedKey, in []byte) ([]byte, error) {
	if err := s.c.lib.DecryptInit(s.h, mechanism(pkcs11.CKM_RSA_X_509, nil), k.use); err != nil {
		return nil, err
	}
	return s.c.lib.Decrypt(s.h, in)
}

// sha256Info is the DER of a PKCS#1 DigestInfo for SHA-256 without the digest.
// RFC 8017, section 9.2, note 1.
var sha256Info = [...]byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20}

// provePair lets a private half sign and reports whether the public half
// verifies that.
func (s *session) provePair(private pkcs11.ObjectHandle, typ pluginproto.KeyType, spki []byte) (bool, error) {
	const op = "proving a key pair"
	pub, err := parsePublic(spki, typ)
	if err != nil {
		return false, pluginproto.Errorf(pluginproto.ClassCaller, op, "%v", err)
	}
	digest := sha256.Sum256([]byte(checkLabel))
	cmd := pluginproto.Command{Op: pluginproto.OpVerify, Hash: pluginproto.SHA256, Input: digest[:]}
	mech, data := uint(pkcs11.CKM_ECDSA), digest[:]
	if isRSA(typ) {
		mech, data = pkcs11.CKM_RSA_PKCS, append(sha256Info[:len(sha256Info):len(sha256Info)], digest[:]...)
	}
	if err := s.c.lib.SignInit(s.h, mechanism(mech, nil), private); err != nil {
		return false, s.fail(op, err)
	}
	if cmd.Signature, err = s.c.lib.Sign(s.h, data); err != nil {
		return false, s.fail(op, err)
	}
	return verify(pub, cmd) == nil, nil
}
