package p11_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"math/big"
	"testing"

	"kmsd/plugins/internal/p11"
)

// raw is the private operation without padding, as a token does it.
func raw(key *rsa.PrivateKey, in []byte) []byte {
	return new(big.Int).Exp(new(big.Int).SetBytes(in), key.D, key.N).Bytes() // leading zeros are lost
}

func TestOAEPPaddingIsRemoved(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512} {
		most := key.Size() - 2*h.Size() - 2
		for _, n := range []int{0, 1, 32, most} {
			text := bytes.Repeat([]byte{1}, n) // ones, as the byte before the message is one
			sealed, err := rsa.EncryptOAEP(h.New(), rand.Reader, &key.PublicKey, text, nil)
			if err != nil {
				t.Fatal(err)
			}
			block := raw(key, sealed)
			got, ok := p11.UnpadOAEP(h, block, key.Size())
			if !ok || !bytes.Equal(got, text) {
				t.Errorf("%v, %d bytes: %v %x", h, n, ok, got)
			}
			full := make([]byte, key.Size())
			copy(full[key.Size()-len(block):], block)
			for at := range full {
				bad := bytes.Clone(full)
				bad[at] ^= 4
				if _, ok := p11.UnpadOAEP(h, bad, key.Size()); ok {
					t.Fatalf("%v: a flipped bit in byte %d is not noticed", h, at)
				}
			}
		}
		labelled, err := rsa.EncryptOAEP(h.New(), rand.Reader, &key.PublicKey, nil, []byte("label"))
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := p11.UnpadOAEP(h, raw(key, labelled), key.Size()); ok {
			t.Errorf("%v: a label is not noticed", h)
		}
	}
	for _, block := range [][]byte{nil, {1}, make([]byte, key.Size()), make([]byte, key.Size()+1)} {
		if _, ok := p11.UnpadOAEP(crypto.SHA256, block, key.Size()); ok {
			t.Errorf("%d bytes are taken for a message", len(block))
		}
	}
	if _, ok := p11.UnpadOAEP(crypto.SHA512, make([]byte, 100), 100); ok {
		t.Error("a modulus too small for the hash is taken")
	}
}

func FuzzUnpadOAEP(f *testing.F) {
	f.Add(make([]byte, 256))
	f.Fuzz(func(t *testing.T, block []byte) {
		if out, ok := p11.UnpadOAEP(crypto.SHA256, block, 256); ok && len(out) > 256-66 {
			t.Errorf("%d bytes", len(out))
		}
	})
}
