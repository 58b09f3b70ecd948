package lunasim_test

import (
	"bytes"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
)

// Curves as CKA_EC_PARAMS (RFC 5480 section 2.1.1.1).
var (
	p256 = []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}
	p521 = []byte{6, 5, 0x2b, 0x81, 4, 0, 0x23}
)

// TestEveryKindOfObjectArrivesWhole clones one of each and compares what can be read.
func TestEveryKindOfObjectArrivesWhole(t *testing.T) {
	source, target := start(t, lunasim.Options{}), start(t, lunasim.Options{})
	secret := func(mechanism uint, bytes int, use uint) func(id *pkcs11.Attribute) pkcs11.ObjectHandle {
		return func(id *pkcs11.Attribute) pkcs11.ObjectHandle {
			return must(source.GenerateKey(source.h, mech(mechanism, nil), []*pkcs11.Attribute{
				id, attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_VALUE_LEN, bytes), attr(use, true), attr(pkcs11.CKA_LABEL, "a\x00b"),
			}))(t)
		}
	}
	pair := func(mechanism uint, public *pkcs11.Attribute, half int) func(id *pkcs11.Attribute) pkcs11.ObjectHandle {
		return func(id *pkcs11.Attribute) pkcs11.ObjectHandle {
			token := attr(pkcs11.CKA_TOKEN, true)
			pub, priv, err := source.GenerateKeyPair(source.h, mech(mechanism, nil),
				[]*pkcs11.Attribute{id, token, public, attr(pkcs11.CKA_VERIFY, true)}, []*pkcs11.Attribute{id, token, attr(pkcs11.CKA_SIGN, true)})
			if err != nil {
				t.Fatal(err)
			}
			return []pkcs11.ObjectHandle{pub, priv}[half]
		}
	}
	secretAttrs := []uint{pkcs11.CKA_CLASS, pkcs11.CKA_KEY_TYPE, pkcs11.CKA_ID, pkcs11.CKA_LABEL, pkcs11.CKA_VALUE_LEN, pkcs11.CKA_ENCRYPT, pkcs11.CKA_SIGN,
		pkcs11.CKA_EXTRACTABLE, pkcs11.CKA_NEVER_EXTRACTABLE, pkcs11.CKA_SENSITIVE, pkcs11.CKA_PRIVATE, pkcs11.CKA_TOKEN, ckaOUID}
	rsaAttrs := []uint{pkcs11.CKA_CLASS, pkcs11.CKA_ID, pkcs11.CKA_MODULUS, pkcs11.CKA_PUBLIC_EXPONENT, pkcs11.CKA_PRIVATE, ckaOUID}
	ecAttrs := []uint{pkcs11.CKA_CLASS, pkcs11.CKA_ID, pkcs11.CKA_EC_PARAMS, pkcs11.CKA_PRIVATE, ckaOUID}
	for i, c := range []struct {
		name  string
		make  func(id *pkcs11.Attribute) pkcs11.ObjectHandle
		attrs []uint
		key   bool // it has bytes to keep to itself
	}{
		{"AES-128", secret(pkcs11.CKM_AES_KEY_GEN, 16, pkcs11.CKA_ENCRYPT), secretAttrs, true},
		{"AES-256", secret(pkcs11.CKM_AES_KEY_GEN, 32, pkcs11.CKA_ENCRYPT), secretAttrs, true},
		{"a generic secret", secret(pkcs11.CKM_GENERIC_SECRET_KEY_GEN, 32, pkcs11.CKA_SIGN), secretAttrs, true},
		{"an RSA private half", pair(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, attr(pkcs11.CKA_MODULUS_BITS, 1024), 1), rsaAttrs, true},
		{"an RSA public half", pair(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, attr(pkcs11.CKA_MODULUS_BITS, 1024), 0), append(rsaAttrs, pkcs11.CKA_MODULUS_BITS), false},
		{"a P-256 private half", pair(pkcs11.CKM_EC_KEY_PAIR_GEN, attr(pkcs11.CKA_EC_PARAMS, p256), 1), ecAttrs, true},
		{"a P-521 private half", pair(pkcs11.CKM_EC_KEY_PAIR_GEN, attr(pkcs11.CKA_EC_PARAMS, p521), 1), ecAttrs, true},
		{"a P-521 public half", pair(pkcs11.CKM_EC_KEY_PAIR_GEN, attr(pkcs11.CKA_EC_PARAMS, p521), 0), append(ecAttrs, pkcs11.CKA_EC_POINT), false},
		{"a data object", func(*pkcs11.Attribute) pkcs11.ObjectHandle {
			return must(source.CreateObject(source.h, []*pkcs11.Attribute{
				attr(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, "note"), attr(pkcs11.CKA_VALUE, []byte("text")),
			}))(t)
		}, []uint{pkcs11.CKA_CLASS, pkcs11.CKA_LABEL, pkcs11.CKA_VALUE, ckaOUID}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := string(rune('A' + i))
			o := c.make(attr(pkcs11.CKA_ID, []byte(id)))
			x := newCPv3(source, target, o)
			wantCode(t, "the transfer", x.run(), 0)
			for _, typ := range c.attrs {
				if got, want := target.get(pkcs11.ObjectHandle(x.made), typ), source.get(o, typ); !bytes.Equal(got, want) {
					t.Errorf("attribute %#x is %x on the target and %x on the source", typ, got, want)
				}
			}
			if want := source.bytesOf(id); c.key && (len(want) == 0 || !bytes.Equal(target.bytesOf(id), want)) {
				t.Error("the key has other bytes on the target")
			} else if c.key && bytes.Contains(x.c, want[:8]) {
				t.Error("the key can be read in the blob")
			}
		})
	}
}

// must returns a function that gives the object, or ends the test.
func must(o pkcs11.ObjectHandle, err error) func(testing.TB) pkcs11.ObjectHandle {
	return func(t testing.TB) pkcs11.ObjectHandle {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
}
