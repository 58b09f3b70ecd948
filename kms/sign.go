package kms

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	_ "crypto/sha256" // the digests that crypto.Hash.Size knows
	_ "crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"math/big"
	"strconv"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// hash is a digest as users, Go and drivers call it.
type hash struct {
	name   string
	std    crypto.Hash
	driver pluginproto.Hash
}

func hashNamed(name string) (hash, error) {
	for _, h := range []hash{
		{"sha-256", crypto.SHA256, pluginproto.SHA256},
		{"sha-384", crypto.SHA384, pluginproto.SHA384},
		{"sha-512", crypto.SHA512, pluginproto.SHA512},
	} {
		if name == h.name || name == "" && h.std == crypto.SHA256 {
			return h, nil
		}
	}
	return hash{}, badRequest("there is no hash %q; choose sha-256, sha-384 or sha-512", name)
}

// Sign signs a digest with the newest enabled version of a key pair.
func (k *KMS) Sign(ctx context.Context, name string, req SignRequest) (Signature, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	key, i, err := k.version(name, 0)
	if err != nil {
		return Signature{}, err
	}
	how, err := signing(key, req)
	if err != nil {
		return Signature{}, err
	}
	res, err := k.do(ctx, key, i, pluginproto.Command{
		Op: pluginproto.OpSign, Key: key.ids[i], Mech: how.mech, Hash: how.hash.driver, Input: req.Digest,
	})
	if err == nil && how.mech == pluginproto.ECDSA {
		res.Output, err = derSignature(res.Output)
	}
	if err != nil {
		return Signature{}, translate("signing with key "+strconv.Quote(name), err)
	}
	return Signature{Signature: res.Output, Version: key.rec.Versions[i].Number}, nil
}

// VerifySignature checks a signature with the public key in the catalog; no HSM is
// asked.
func (k *KMS) VerifySignature(_ context.Context, name string, req VerifyRequest) (bool, error) {
	key, i, err := k.version(name, req.Version)
	if err != nil {
		return false, err
	}
	how, err := signing(key, req.SignRequest)
	if err != nil {
		return false, err
	}
	if len(req.Signature) == 0 {
		return false, badRequest("there is no signature")
	}
	public, err := x509.ParsePKIXPublicKey(key.rec.Versions[i].Public)
	if err != nil {
		return false, translate("reading the public key of "+strconv.Quote(name), err)
	}
	switch p := public.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(p, req.Digest, req.Signature), nil
	case *rsa.PublicKey:
		if how.mech == pluginproto.RSAPSS {
			return rsa.VerifyPSS(p, how.hash.std, req.Digest, req.Signature, nil) == nil, nil
		}
		return rsa.VerifyPKCS1v15(p, how.hash.std, req.Digest, req.Signature) == nil, nil
	default:
		return false, translate("reading the public key of "+strconv.Quote(name), fmt.Errorf("it is a %T", public))
	}
}

// Decrypt undoes RSA-OAEP.
func (k *KMS) Decrypt(ctx context.Context, name string, req DecryptRequest) ([]byte, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	key, i, err := k.version(name, req.Version)
	if err != nil {
		return nil, err
	}
	size := rsaSize(key.typ)
	if size == 0 {
		return nil, badRequest("key %s has type %s, which does not decrypt; it takes an RSA key", name, key.typ)
	}
	h, err := hashNamed(req.Hash)
	if err != nil {
		return nil, err
	}
	if len(req.Ciphertext) != size {
		return nil, badRequest("the ciphertext has %d bytes, one made for key %s has %d", len(req.Ciphertext), name, size)
	}
	res, err := k.do(ctx, key, i, pluginproto.Command{
		Op: pluginproto.OpDecrypt, Key: key.ids[i], Mech: pluginproto.RSAOAEP, Hash: h.driver, Input: req.Ciphertext,
	})
	return res.Output, translate("decrypting with key "+strconv.Quote(name), err)
}

// MAC computes an HMAC.
func (k *KMS) MAC(ctx context.Context, name string, req MACRequest) (MAC, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	key, i, err := k.version(name, req.Version)
	if err != nil {
		return MAC{}, err
	}
	if key.typ != pluginproto.HMACSHA256 {
		return MAC{}, badRequest("key %s has type %s, which makes no MAC; it takes an %s key", name, key.typ, pluginproto.HMACSHA256)
	}
	if len(req.Message) > api.MaxPlaintext {
		return MAC{}, tooLarge("the message has %d bytes, at most %d are allowed", len(req.Message), api.MaxPlaintext)
	}
	res, err := k.do(ctx, key, i, pluginproto.Command{
		Op: pluginproto.OpMAC, Key: key.ids[i], Mech: pluginproto.HMAC, Hash: pluginproto.SHA256, Input: req.Message,
	})
	if err != nil {
		return MAC{}, translate("computing a MAC with key "+strconv.Quote(name), err)
	}
	return MAC{MAC: res.Output, Version: key.rec.Versions[i].Number}, nil
}

// version returns a key and the index of one of its versions that may be used; 0
// means the newest.
func (k *KMS) version(name string, number int) (*key, int, error) {
	key, err := k.ring.get(name)
	if err != nil {
		return nil, 0, err
	}
	i, err := key.number(number)
	return key, i, err
}

// scheme is how a key signs.
type scheme struct {
	mech pluginproto.Mechanism
	hash hash
}

// signing returns how a request is signed, or why it cannot be.
func signing(key *key, req SignRequest) (scheme, error) {
	h, err := hashNamed(req.Hash)
	if err != nil {
		return scheme{}, err
	}
	if len(req.Digest) != h.std.Size() {
		return scheme{}, badRequest("the digest has %d bytes, one of %s has %d", len(req.Digest), h.name, h.std.Size())
	}
	isRSA, isEC := rsaSize(key.typ) > 0, isEC(key.typ)
	switch {
	case isRSA && (req.Padding == "" || req.Padding == "pss"):
		return scheme{pluginproto.RSAPSS, h}, nil
	case isRSA && req.Padding == "pkcs1v15":
		return scheme{pluginproto.RSAPKCS1v15, h}, nil
	case isRSA:
		return scheme{}, badRequest("there is no padding %q; choose pss or pkcs1v15", req.Padding)
	case isEC && req.Padding == "":
		return scheme{pluginproto.ECDSA, h}, nil
	case isEC:
		return scheme{}, badRequest("padding is for RSA; key %s has type %s", key.rec.Name, key.typ)
	default:
		return scheme{}, badRequest("key %s has type %s, which does not sign", key.rec.Name, key.typ)
	}
}

func isEC(t pluginproto.KeyType) bool {
	return t == pluginproto.ECP256 || t == pluginproto.ECP384 || t == pluginproto.ECP521
}

// rsaSize is the size of an RSA key's modulus in bytes, 0 for other keys.
func rsaSize(t pluginproto.KeyType) int {
	switch t {
	case pluginproto.RSA2048:
		return 2048 / 8
	case pluginproto.RSA3072:
		return 3072 / 8
	case pluginproto.RSA4096:
		return 4096 / 8
	default:
		return 0
	}
}

// derSignature turns r ‖ s, as PKCS#11 has it, into the DER that everybody else
// expects.
func derSignature(raw []byte) ([]byte, error) {
	n := len(raw) / 2
	if n == 0 || len(raw)%2 != 0 {
		return nil, fmt.Errorf("the driver answered with a signature of %d bytes", len(raw))
	}
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:n]), new(big.Int).SetBytes(raw[n:])})
}
