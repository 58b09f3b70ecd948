package p11

import (
	"crypto/sha256"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// checkLabel is the text that check values are computed over. It is part of the
// contract between drivers and of the clone format; golden tests hold it.
const (
	checkLabel     = "kmsd check value v1"
	checkValueSize = 8 // bytes
)

// checkValue computes the check value of a key. For a secret key the token does
// it: an encryption of one block (AES-ECB) or a MAC. The first 16 bytes of the
// SHA-256 of a fixed text are a block that no other use of the key encrypts, but
// with a chance of 2^-128 for each.
func (s *session) checkValue(o halves, d described) ([]byte, error) {
	if len(o.secret) == 0 {
		sum := sha256.Sum256(d.spki)
		return sum[:checkValueSize], nil
	}
	return s.checkSecret(o.secret[0], d.typ)
}

func (s *session) checkSecret(h pkcs11.ObjectHandle, typ pluginproto.KeyType) ([]byte, error) {
	const op = "computing a check value"
	var out []byte
	var err error
	if typ == pluginproto.HMACSHA256 {
		if err = s.c.lib.SignInit(s.h, mechanism(pkcs11.CKM_SHA256_HMAC, nil), h); err == nil {
			out, err = s.c.lib.Sign(s.h, []byte(checkLabel))
		}
	} else {
		block := sha256.Sum256([]byte(checkLabel))
		if err = s.c.lib.EncryptInit(s.h, mechanism(pkcs11.CKM_AES_ECB, nil), h); err == nil {
			out, err = s.c.lib.Encrypt(s.h, block[:16])
		}
	}
	if err != nil {
		return nil, s.fail(op, err)
	}
	if len(out) < checkValueSize {
		return nil, pluginproto.Errorf(pluginproto.ClassMember, op, "the token answered %d bytes", len(out))
	}
	return out[:checkValueSize], nil
}

func mechanism(ckm uint, param any) []*pkcs11.Mechanism {
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(ckm, param)}
}
