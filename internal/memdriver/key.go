package memdriver

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"

	"kmsd/pluginproto"
)

// checkSize is the length of a check value in bytes.
const checkSize = 8

// checkBlock is what a check value is an encryption or a MAC of.
const checkBlock = "kmsd check value" // one AES block

// key is one key on one token. It is not changed once it is made.
type key struct {
	typ    pluginproto.KeyType
	label  string
	secret []byte        // AES, HMAC
	aead   cipher.AEAD   // AES
	signer crypto.Signer // pairs
	public []byte        // pairs: DER SubjectPublicKeyInfo
	check  []byte
}

func newKey(typ pluginproto.KeyType, label string) (*key, error) {
	if n := secretSize(typ); n > 0 {
		secret := make([]byte, n)
		rand.Read(secret) // never fails
		return secretKey(typ, label, secret)
	}
	var signer crypto.Signer
	var err error
	switch typ {
	case pluginproto.RSA2048:
		signer, err = rsa.GenerateKey(rand.Reader, 2048)
	case pluginproto.RSA3072:
		signer, err = rsa.GenerateKey(rand.Reader, 3072)
	case pluginproto.RSA4096:
		signer, err = rsa.GenerateKey(rand.Reader, 4096)
	case pluginproto.ECP256:
		signer, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case pluginproto.ECP384:
		signer, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case pluginproto.ECP521:
		signer, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	default:
		return nil, pluginproto.Errorf(pluginproto.ClassCaller, "generating a key", "no such type: %q", typ)
	}
	if err != nil {
		return nil, fmt.Errorf("generating a %s key: %w", typ, err)
	}
	return pair(typ, label, signer)
}

func secretSize(typ pluginproto.KeyType) int {
	switch typ {
	case pluginproto.AES128:
		return 16
	case pluginproto.AES256, pluginproto.HMACSHA256:
		return 32
	default:
		return 0
	}
}

func secretKey(typ pluginproto.KeyType, label string, secret []byte) (*key, error) {
	k := &key{typ: typ, label: label, secret: secret}
	if typ == pluginproto.HMACSHA256 {
		k.check = mac(secret, []byte(checkBlock))[:checkSize]
		return k, nil
	}
	block, err := aes.NewCipher(secret)
	if err != nil {
		return nil, fmt.Errorf("making a %s key: %w", typ, err)
	}
	out := make([]byte, aes.BlockSize)
	block.Encrypt(out, []byte(checkBlock))
	k.check = out[:checkSize]
	k.aead, err = cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("making a %s key: %w", typ, err)
	}
	return k, nil
}

func pair(typ pluginproto.KeyType, label string, signer crypto.Signer) (*key, error) {
	public, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return nil, fmt.Errorf("encoding the public half: %w", err)
	}
	sum := sha256.Sum256(public)
	return &key{typ: typ, label: label, signer: signer, public: public, check: sum[:checkSize]}, nil
}

// export returns the key in the clear, for a clone to seal.
func (k *key) export() ([]byte, error) {
	if k.typ.Symmetric() {
		return append([]byte(nil), k.secret...), nil
	}
	return x509.MarshalPKCS8PrivateKey(k.signer)
}

// importKey reads what export wrote.
func importKey(typ pluginproto.KeyType, label string, clear []byte) (*key, error) {
	if typ.Symmetric() {
		return secretKey(typ, label, append([]byte(nil), clear...))
	}
	parsed, err := x509.ParsePKCS8PrivateKey(clear)
	if err != nil {
		return nil, fmt.Errorf("reading a private key: %w", err)
	}
	signer, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("reading a private key: %T cannot sign", parsed)
	}
	return pair(typ, label, signer)
}

func (k *key) object(id pluginproto.KeyID) pluginproto.Object {
	return pluginproto.Object{
		ID:         id,
		Type:       k.typ,
		Label:      k.label,
		CheckValue: append([]byte(nil), k.check...),
		Public:     append([]byte(nil), k.public...),
	}
}

func mac(secret, message []byte) []byte {
	h := hmac.New(sha256.New, secret)
	h.Write(message)
	return h.Sum(nil)
}
