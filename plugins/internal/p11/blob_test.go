package p11_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

func testDomain(t testing.TB) *p11.Domain {
	t.Helper()
	d, err := p11.NewDomain(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func secretObject() pluginproto.Object {
	return pluginproto.Object{
		ID: pluginproto.KeyID{1, 2, 3}, Type: pluginproto.AES256, Label: "shop", CheckValue: []byte("checkval"),
	}
}

func TestBlobRoundTrip(t *testing.T) {
	d := testDomain(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	pair := secretObject()
	pair.Type, pair.Public, pair.Label = pluginproto.ECP256, spki, ""
	for _, o := range []pluginproto.Object{secretObject(), pair} {
		raw, err := p11.NewBlob([16]byte{9}, o, []byte("wrapped")).Encode(d)
		if err != nil {
			t.Fatal(err)
		}
		b, err := p11.DecodeBlob(d, raw)
		if err != nil {
			t.Fatal(err)
		}
		transfer, got, wrapped := b.Parts()
		if transfer != [16]byte{9} || string(wrapped) != "wrapped" || fmt.Sprint(got) != fmt.Sprint(o) {
			t.Errorf("%v became %v", o, got)
		}
	}
}

// A blob as this version writes it. Tokens of one group may run drivers of
// different versions, so it is never made anew.
const goldenBlob = "4b4d4342" + "01" + "09000000000000000000000000000000" + "01020300000000000000000000000000" + "02" +
	"636865636b76616c" + "0004" + "73686f70" + "0000" + "0007" + "77726170706564" +
	"2aba68c8135604fa436b2a43be2eae42d0b34afda627356f059a5db8c3174c65"

func TestGoldenBlob(t *testing.T) {
	raw, err := p11.NewBlob([16]byte{9}, secretObject(), []byte("wrapped")).Encode(testDomain(t))
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(raw); got != goldenBlob {
		t.Errorf("the blob is now\n%s, was\n%s", got, goldenBlob)
	}
}

func TestBlobsThatAreRefused(t *testing.T) {
	d := testDomain(t)
	good, err := p11.NewBlob([16]byte{9}, secretObject(), []byte("wrapped")).Encode(d)
	if err != nil {
		t.Fatal(err)
	}
	body := good[:len(good)-32]
	sealed := func(change func([]byte) []byte) []byte {
		b := change(bytes.Clone(body))
		return append(b, d.Sum(b)...)
	}
	other, err := p11.NewDomain(bytes.Repeat([]byte{8}, 32))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, want string
		raw        []byte
	}{
		{"nothing", "it has 0 bytes", nil},
		{"a blob that is too long", "bytes", make([]byte, 1<<20)},
		{"one of another domain", "another domain", append(bytes.Clone(body), other.Sum(body)...)},
		{"another beginning", "does not begin", sealed(func(b []byte) []byte { b[0] = 'X'; return b })},
		{"a format of the future", "format version 2, this driver knows 1", sealed(func(b []byte) []byte { b[4] = 2; return b })},
		{"a type of the future", "key type 99", sealed(func(b []byte) []byte { b[37] = 99; return b })},
		{"a pair without a public half", "public key", sealed(func(b []byte) []byte { b[37] = 7; return b })},
		{"a length past the end", "lengths", sealed(func(b []byte) []byte { b[47] = 200; return b })},
		{"bytes left over", "lengths", sealed(func(b []byte) []byte { return append(b, 0) })},
		{"no key", "lengths", sealed(func(b []byte) []byte { return append(b[:len(b)-9], 0, 0) })},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := p11.DecodeBlob(d, tc.raw); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
	for at := range good {
		bad := bytes.Clone(good)
		bad[at] ^= 0x10
		if _, err := p11.DecodeBlob(d, bad); err == nil {
			t.Errorf("a flipped bit in byte %d is not noticed", at)
		}
	}
}

func FuzzParseBlob(f *testing.F) {
	d, err := p11.NewDomain(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		f.Fatal(err)
	}
	good, err := p11.NewBlob([16]byte{9}, secretObject(), []byte("wrapped")).Encode(d)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good[:len(good)-32])
	f.Add([]byte("KMCB\x01"))
	f.Fuzz(func(t *testing.T, body []byte) {
		b, err := p11.ParseBlob(body)
		if err != nil {
			return
		}
		again, err := b.Encode(d)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		if !bytes.Equal(again[:len(again)-32], body) {
			t.Error("two blobs say the same")
		}
	})
}

func TestDomain(t *testing.T) {
	if got := hex.EncodeToString(testDomain(t).Check()); got != "dffa458d5a6efee5" {
		t.Errorf("the domain's check value is now %s", got)
	}
	_, err := p11.NewDomain(make([]byte, 31))
	if pluginproto.ClassOf(err) != pluginproto.ClassMember || !strings.Contains(err.Error(), "31 bytes, at least 32") {
		t.Errorf("a short secret: %v", err)
	}
}
