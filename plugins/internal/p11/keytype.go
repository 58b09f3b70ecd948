package p11

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// kind is how a key type is said in PKCS#11. The zero value is no type.
type kind struct {
	ckk   uint           // CKA_KEY_TYPE
	bits  int            // size of a secret key or of an RSA modulus
	curve elliptic.Curve // EC keys only
	oid   []byte         // EC keys only: CKA_EC_PARAMS, the curve's OBJECT IDENTIFIER in DER
}

func kindOf(t pluginproto.KeyType) (kind, error) {
	switch t {
	case pluginproto.AES128:
		return kind{ckk: pkcs11.CKK_AES, bits: 128}, nil
	case pluginproto.AES256:
		return kind{ckk: pkcs11.CKK_AES, bits: 256}, nil
	case pluginproto.HMACSHA256:
		return kind{ckk: pkcs11.CKK_GENERIC_SECRET, bits: 256}, nil
	case pluginproto.RSA2048:
		return kind{ckk: pkcs11.CKK_RSA, bits: 2048}, nil
	case pluginproto.RSA3072:
		return kind{ckk: pkcs11.CKK_RSA, bits: 3072}, nil
	case pluginproto.RSA4096:
		return kind{ckk: pkcs11.CKK_RSA, bits: 4096}, nil
	case pluginproto.ECP256: // RFC 5480 section 2.1.1.1: 1.2.840.10045.3.1.7
		return kind{ckk: pkcs11.CKK_EC, curve: elliptic.P256(), oid: []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}}, nil
	case pluginproto.ECP384: // 1.3.132.0.34
		return kind{ckk: pkcs11.CKK_EC, curve: elliptic.P384(), oid: []byte{6, 5, 0x2b, 0x81, 4, 0, 0x22}}, nil
	case pluginproto.ECP521: // 1.3.132.0.35
		return kind{ckk: pkcs11.CKK_EC, curve: elliptic.P521(), oid: []byte{6, 5, 0x2b, 0x81, 4, 0, 0x23}}, nil
	default:
		return kind{}, pluginproto.Errorf(pluginproto.ClassCaller, "choosing a key type", "there is no key type %q", string(t))
	}
}

// typeOfSecret names the type of a secret key, false for one that is not ours.
func typeOfSecret(ckk, bytes uint) (pluginproto.KeyType, bool) {
	for _, t := range pluginproto.KeyTypes() {
		if k, err := kindOf(t); err == nil && t.Symmetric() && k.ckk == ckk && uint(k.bits) == 8*bytes {
			return t, true
		}
	}
	return "", false
}

// typeOfPublic names the type of a pair by its public half.
func typeOfPublic(pub crypto.PublicKey) (pluginproto.KeyType, bool) {
	for _, t := range pluginproto.KeyTypes() {
		k, err := kindOf(t)
		if err != nil {
			continue
		}
		switch pub := pub.(type) {
		case *rsa.PublicKey:
			if k.ckk == pkcs11.CKK_RSA && k.bits == pub.N.BitLen() {
				return t, true
			}
		case *ecdsa.PublicKey:
			if k.curve == pub.Curve {
				return t, true
			}
		}
	}
	return "", false
}

// publicFromRSA builds a public key from CKA_MODULUS and CKA_PUBLIC_EXPONENT.
func publicFromRSA(modulus, exponent []byte) (*rsa.PublicKey, error) {
	e := new(big.Int).SetBytes(exponent)
	if len(modulus) > 1024 || !e.IsInt64() || e.Int64() < 3 || e.Int64() > 1<<31-1 {
		return nil, errors.New("the token gave an RSA public key that is none")
	}
	return &rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: int(e.Int64())}, nil
}

// publicFromEC builds a public key from CKA_EC_PARAMS and CKA_EC_POINT, the second
// of which is a DER OCTET STRING around the uncompressed point (PKCS#11 2.40
// section 2.3.3), or the bare point on tokens that never read that line.
func publicFromEC(params, point []byte) (*ecdsa.PublicKey, error) {
	var raw []byte
	if rest, err := asn1.Unmarshal(point, &raw); err != nil || len(rest) != 0 {
		raw = point
	}
	for _, t := range pluginproto.KeyTypes() {
		if k, err := kindOf(t); err == nil && k.curve != nil && slices.Equal(k.oid, params) {
			pub, err := ecdsa.ParseUncompressedPublicKey(k.curve, raw)
			if err != nil {
				return nil, fmt.Errorf("reading the point of an EC public key: %w", err)
			}
			return pub, nil
		}
	}
	return nil, errors.New("the token has an EC key on a curve that is not supported")
}

// parsePublic reads a SubjectPublicKeyInfo and checks that it is of the type.
func parsePublic(spki []byte, want pluginproto.KeyType) (crypto.PublicKey, error) {
	pub, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, fmt.Errorf("reading a public key: %w", err)
	}
	if t, ok := typeOfPublic(pub); !ok || t != want {
		return nil, fmt.Errorf("reading a public key: it is not of the type %s", want)
	}
	return pub, nil
}
