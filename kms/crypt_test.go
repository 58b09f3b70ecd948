package kms_test

import (
	"bytes"
	"context"

	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

func TestAlteredEnvelopes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.create("shop")
		wrapped := r.wrap("shop")

		for n := range wrapped {
			_, err := r.Unwrap(t.Context(), "shop", wrapped[:n], []byte("aad"))
			if !errors.Is(err, kms.ErrCorrupt) {
				t.Fatalf("cut to %d bytes: %v, want ErrCorrupt", n, err)
			}
		}
		for bit := range len(wrapped) * 8 {
			altered := slices.Clone(wrapped)
			altered[bit/8] ^= 1 << (bit % 8)
			got, err := r.Unwrap(t.Context(), "shop", altered, []byte("aad"))
			want := kms.ErrCorrupt
			if byte := bit / 8; byte >= 6 && byte < 22 { // the identity
				want = kms.ErrWrongKey
			}
			if !errors.Is(err, want) || got != nil {
				t.Fatalf("bit %d altered: %x, %v, want %v", bit, got, err, want)
			}
		}
		r.wantUnwrap("shop", wrapped)
	})
}

func TestEnvelopesThatAreRefused(t *testing.T) {
	as := func(wrapped []byte) []byte { return wrapped }
	for _, c := range []struct {
		name, key string
		alter     func(wrapped []byte) []byte
		aad       string
		want      error
		text      string
	}{
		{"another aad", "shop", as, "add", kms.ErrCorrupt, `unwrapping with key "shop"`},
		{"no aad", "shop", as, "", kms.ErrCorrupt, `unwrapping with key "shop"`},
		{"a byte too many", "shop", func(wrapped []byte) []byte { return append(wrapped, 0) }, "aad", kms.ErrCorrupt, ""},
		{"another key", "other", as, "aad", kms.ErrWrongKey, "was not made with key other"},
		{"a key that does not exist", "nokey", as, "aad", kms.ErrNotFound, `there is no key "nokey"`},
		{"nothing", "shop", func([]byte) []byte { return nil }, "aad", kms.ErrCorrupt, "not an envelope of kmsd"},
		{"far too much", "shop", func([]byte) []byte { return make([]byte, 1<<20) }, "aad", kms.ErrTooLarge, "the envelope has 1048576 bytes"},
		{"far too much aad", "shop", as, string(make([]byte, 1<<20)), kms.ErrTooLarge, "the aad has 1048576 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 2).mustStart()
				defer r.stop()
				r.create("shop")
				r.create("other")
				wrapped := r.wrap("shop")
				_, err := r.Unwrap(t.Context(), c.key, c.alter(slices.Clone(wrapped)), []byte(c.aad))
				wantError(t, err, c.want, c.text)
				_, err = r.Rewrap(t.Context(), c.key, c.alter(slices.Clone(wrapped)), []byte(c.aad))
				wantError(t, err, c.want, c.text)
				r.wantUnwrap("shop", wrapped)
			})
		})
	}
}

// An unwrap may fail with anything but the answer that the key, or what was wrapped
// with it, does not exist: a database would make a new one and lose its data.
func TestNoFaultMakesAKeyAbsent(t *testing.T) {
	var faults []memdriver.Fault
	for _, class := range []pluginproto.Class{pluginproto.ClassUnknown, pluginproto.ClassNotFound, pluginproto.ClassBusy, pluginproto.ClassMember} {
		faults = append(faults, memdriver.Fault{Call: memdriver.CallDo, Op: pluginproto.OpDecrypt,
			Err: &pluginproto.Error{Class: class, CKR: pluginproto.CKRGeneralError, Op: "decrypting"}})
	}
	faults = append(faults, memdriver.Fault{Call: memdriver.CallDo, Op: pluginproto.OpDecrypt, Hang: make(chan struct{})})
	for first := range faults {
		for second := range faults {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 2).mustStart()
				defer r.stop()
				r.create("shop")
				wrapped := r.wrap("shop")
				hang := make(chan struct{})
				for i, f := range []memdriver.Fault{faults[first], faults[second]} {
					if f.Hang != nil {
						f.Hang = hang
					}
					r.hsms[i].faults = []memdriver.Fault{f}
					r.hsms[i].driver().Script(f)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				began := time.Now()
				_, err := r.Unwrap(ctx, "shop", wrapped, []byte("aad"))
				switch code := api.AsError(err).Code; code {
				case api.CodeUnavailable, api.CodeGroupLost, api.CodeDeadline:
				default:
					t.Errorf("faults %d and %d: %s (%v)", first, second, code, err)
				}
				if took := time.Since(began); took > 5050*time.Millisecond {
					t.Errorf("faults %d and %d: the answer took %v", first, second, took)
				}
				if _, err := r.Key(t.Context(), "shop"); err != nil {
					t.Errorf("the key: %v", err)
				}
			})
		}
	}
}

func TestSizes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1).mustStart()
		defer r.stop()
		r.create("shop")
		for _, c := range []struct {
			n    int
			want error
		}{{0, kms.ErrBadRequest}, {1, nil}, {64 << 10, nil}, {64<<10 + 1, kms.ErrTooLarge}} {
			plaintext := bytes.Repeat([]byte{1}, c.n)
			wrapped, err := r.Wrap(t.Context(), "shop", plaintext, nil)
			if !errors.Is(err, c.want) {
				t.Errorf("wrapping %d bytes: %v, want %v", c.n, err, c.want)
			}
			if err != nil {
				continue
			}
			if got, err := r.Unwrap(t.Context(), "shop", wrapped, []byte{}); err != nil || !bytes.Equal(got, plaintext) {
				t.Errorf("unwrapping %d bytes: %v", c.n, err)
			}
		}
		longest := make([]byte, 64<<10)
		wrapped, err := r.Wrap(t.Context(), "shop", []byte("x"), longest)
		if err != nil {
			t.Fatalf("binding the longest aad: %v", err)
		}
		if got, err := r.Unwrap(t.Context(), "shop", wrapped, longest); err != nil || string(got) != "x" {
			t.Errorf("unwrapping with the longest aad: %q, %v", got, err)
		}
		_, err = r.Wrap(t.Context(), "shop", []byte("x"), append(longest, 0))
		wantError(t, err, kms.ErrTooLarge, "the aad has 65537 bytes")
	})
}

func TestBatchAnswersInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		items := make([]kms.Item, 1000)
		for i := range items {
			items[i] = kms.Item{Plaintext: []byte{byte(i >> 8), byte(i)}, AAD: []byte{byte(i)}}
		}
		items[7].Plaintext = nil
		wrapped, err := r.Batch(t.Context(), kms.OpWrap, "shop", items)
		if err != nil {
			t.Fatal(err)
		}
		again := make([]kms.Item, len(items))
		for i, res := range wrapped {
			if i == 7 {
				if res.Error == nil || res.Error.Code != api.CodeBadRequest {
					t.Errorf("item 7: %+v, want bad_request", res)
				}
				continue
			}
			again[i] = kms.Item{Wrapped: res.Wrapped, AAD: items[i].AAD}
		}
		back, err := r.Batch(t.Context(), kms.OpUnwrap, "shop", again)
		if err != nil {
			t.Fatal(err)
		}
		for i, res := range back {
			if i != 7 && !bytes.Equal(res.Plaintext, items[i].Plaintext) {
				t.Fatalf("item %d: %+v", i, res)
			}
		}
		for _, c := range []struct {
			op   kms.Op
			name string
			n    int
			want error
		}{
			{"crush", "shop", 1, kms.ErrBadRequest},
			{kms.OpWrap, "nokey", 1, kms.ErrNotFound},
			{kms.OpWrap, "shop", 0, kms.ErrBadRequest},
			{kms.OpWrap, "shop", 1001, kms.ErrTooLarge},
		} {
			if _, err := r.Batch(t.Context(), c.op, c.name, make([]kms.Item, c.n)); !errors.Is(err, c.want) {
				t.Errorf("batch %s of %d with %s: %v, want %v", c.op, c.n, c.name, err, c.want)
			}
		}
	})
}

func TestSignaturesByOthersMeans(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		digest := sha256.Sum256([]byte("message"))
		for _, typ := range []string{"rsa-2048", "ec-p256", "ec-p384", "ec-p521"} {
			if _, err := r.CreateMasterKey(t.Context(), typ+"-key", kms.KeyOptions{Type: typ}); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range []struct{ typ, padding string }{
			{"rsa-2048", ""}, {"rsa-2048", "pss"}, {"rsa-2048", "pkcs1v15"}, {"ec-p256", ""}, {"ec-p384", ""}, {"ec-p521", ""},
		} {
			name := c.typ + "-key"
			req := kms.SignRequest{Digest: digest[:], Padding: c.padding}
			sig, err := r.Sign(t.Context(), name, req)
			if err != nil || sig.Version != 1 {
				t.Fatalf("%s %s: %+v, %v", name, c.padding, sig, err)
			}
			if ok, err := r.VerifySignature(t.Context(), name, kms.VerifyRequest{SignRequest: req, Signature: sig.Signature}); !ok || err != nil {
				t.Errorf("%s %s: verified %v, %v", name, c.padding, ok, err)
			}
			sig.Signature[len(sig.Signature)-1] ^= 1
			if ok, err := r.VerifySignature(t.Context(), name, kms.VerifyRequest{SignRequest: req, Signature: sig.Signature}); ok || err != nil {
				t.Errorf("%s %s altered: verified %v, %v", name, c.padding, ok, err)
			}
		}

		key, err := r.Key(t.Context(), "rsa-2048-key")
		if err != nil {
			t.Fatal(err)
		}
		public, err := x509.ParsePKIXPublicKey(key.Versions[0].PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public.(*rsa.PublicKey), []byte("hello"), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := r.Decrypt(t.Context(), "rsa-2048-key", kms.DecryptRequest{Ciphertext: sealed}); err != nil || string(got) != "hello" {
			t.Errorf("OAEP gives %q, %v", got, err)
		}
		sealed[0] ^= 1
		if _, err := r.Decrypt(t.Context(), "rsa-2048-key", kms.DecryptRequest{Ciphertext: sealed}); !errors.Is(err, kms.ErrCorrupt) {
			t.Errorf("altered OAEP: %v, want ErrCorrupt", err)
		}
		_, err = r.Sign(t.Context(), "rsa-2048-key", kms.SignRequest{Digest: digest[:20]})
		wantError(t, err, kms.ErrBadRequest, "the digest has 20 bytes, one of sha-256 has 32")
		_, err = r.Wrap(t.Context(), "rsa-2048-key", []byte("x"), nil)
		wantError(t, err, kms.ErrBadRequest, "which does not wrap")
	})
}

func TestMACOnEveryMember(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		if _, err := r.CreateMasterKey(t.Context(), "mac", kms.KeyOptions{Type: "hmac-sha256"}); err != nil {
			t.Fatal(err)
		}
		first, err := r.MAC(t.Context(), "mac", kms.MACRequest{Message: []byte("m")})
		if err != nil || len(first.MAC) != sha256.Size {
			t.Fatalf("MAC = %s, %v", hex.EncodeToString(first.MAC), err)
		}
		for range 8 {
			again, err := r.MAC(t.Context(), "mac", kms.MACRequest{Message: []byte("m")})
			if err != nil || !hmac.Equal(again.MAC, first.MAC) {
				t.Fatalf("MAC = %x, %v, want %x", again.MAC, err, first.MAC)
			}
		}
	})
}

func BenchmarkWrap(b *testing.B) {
	r := newRig(b, 3).mustStart()
	defer r.stop()
	r.create("shop")
	dek := make([]byte, 32)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Wrap(b.Context(), "shop", dek, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBatchWrap(b *testing.B) {
	r := newRig(b, 3).mustStart()
	defer r.stop()
	r.create("shop")
	for _, n := range []int{1, 64} {
		items := make([]kms.Item, n)
		for i := range items {
			items[i].Plaintext = make([]byte, 32)
		}
		b.Run(fmt.Sprintf("%d items", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := r.Batch(b.Context(), kms.OpWrap, "shop", items); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkWrapParallel(b *testing.B) {
	r := newRig(b, 3).mustStart()
	defer r.stop()
	r.create("shop")
	dek := make([]byte, 32)
	b.ReportAllocs()
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := r.Wrap(b.Context(), "shop", dek, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
}
