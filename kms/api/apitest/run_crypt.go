package apitest

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"testing"

	"kmsd/kms/api"
)

func unwrapped(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	for _, aad := range [][]byte{nil, {}, []byte("table orders")} {
		wrapped, err := s.Wrap(t.Context(), "shop", []byte("plaintext"), aad)
		ok(t, err, "wrapping")
		if bytes.Contains(wrapped, []byte("plaintext")) {
			t.Fatal("the envelope holds the plaintext")
		}
		p, err := s.Unwrap(t.Context(), "shop", wrapped, aad)
		if err != nil || string(p) != "plaintext" {
			t.Errorf("unwrapping with aad %q: %q, %v", aad, p, err)
		}
		_, err = s.Unwrap(t.Context(), "shop", wrapped, []byte("other"))
		wants(t, err, api.ErrCorrupt, "unwrapping with another aad")
		_, err = s.Rewrap(t.Context(), "shop", wrapped, []byte("other"))
		wants(t, err, api.ErrCorrupt, "rewrapping with another aad")
		if len(aad) == 0 {
			other := []byte{}
			if aad != nil {
				other = nil
			}
			p, err := s.Unwrap(t.Context(), "shop", wrapped, other)
			if err != nil || string(p) != "plaintext" {
				t.Errorf("no aad and an empty one differ: %q, %v", p, err)
			}
		}
	}
}

func plaintextLimits(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	_, err := s.Wrap(t.Context(), "shop", nil, nil)
	wants(t, err, api.ErrBadRequest, "wrapping nothing")
	_, err = s.Wrap(t.Context(), "shop", make([]byte, api.MaxPlaintext+1), nil)
	wants(t, err, api.ErrTooLarge, "wrapping more than the limit")
	for _, n := range []int{1, api.MaxPlaintext} {
		p := make([]byte, n)
		rand.Read(p)
		wrapped, err := s.Wrap(t.Context(), "shop", p, nil)
		ok(t, err, fmt.Sprintf("wrapping %d bytes", n))
		back, err := s.Unwrap(t.Context(), "shop", wrapped, nil)
		if err != nil || !bytes.Equal(back, p) {
			t.Errorf("unwrapping %d bytes: %d bytes, %v", n, len(back), err)
		}
	}
}

func altered(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	wrapped, err := s.Wrap(t.Context(), "shop", []byte("plaintext"), nil)
	ok(t, err, "wrapping")
	items := []api.Item{{Wrapped: []byte("garbage")}, {Wrapped: append(bytes.Clone(wrapped), 0)}}
	for n := 1; n < len(wrapped); n++ {
		items = append(items, api.Item{Wrapped: wrapped[:n]})
	}
	for i := range wrapped {
		changed := bytes.Clone(wrapped)
		changed[i] ^= 1 << (i % 8)
		items = append(items, api.Item{Wrapped: changed})
	}
	results, err := s.Batch(t.Context(), api.OpUnwrap, "shop", items)
	ok(t, err, "unwrapping altered envelopes")
	for i, r := range results {
		if r.Error == nil || r.Error.Code != api.CodeCorrupt && r.Error.Code != api.CodeWrongKey || len(r.Plaintext) != 0 {
			t.Errorf("envelope %d of %d bytes: %+v", i, len(items[i].Wrapped), r)
		}
	}
}

func foreign(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	make1(t, s, "bank", "")
	wrapped, err := s.Wrap(t.Context(), "shop", []byte("p"), nil)
	ok(t, err, "wrapping")
	_, err = s.Unwrap(t.Context(), "bank", wrapped, nil)
	wants(t, err, api.ErrWrongKey, "unwrapping with another key")
	_, err = s.Rewrap(t.Context(), "bank", wrapped, nil)
	wants(t, err, api.ErrWrongKey, "rewrapping with another key")
}

func dataKeyLengths(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	for _, n := range []int{1, 16, 32, api.MaxDataKey} {
		dk, err := s.DataKey(t.Context(), "shop", n, []byte("aad"))
		ok(t, err, "making a data key")
		if len(dk.Plaintext) != n || dk.Version != 1 {
			t.Errorf("a data key of %d bytes and version %d, want %d and 1", len(dk.Plaintext), dk.Version, n)
		}
		p, err := s.Unwrap(t.Context(), "shop", dk.Wrapped, []byte("aad"))
		if err != nil || !bytes.Equal(p, dk.Plaintext) {
			t.Errorf("unwrapping a data key: %v", err)
		}
	}
	for _, n := range []int{0, -1, api.MaxDataKey + 1} {
		_, err := s.DataKey(t.Context(), "shop", n, nil)
		wants(t, err, api.ErrBadRequest, fmt.Sprintf("making a data key of %d bytes", n))
	}
}

func batches(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	items := []api.Item{{Plaintext: []byte("a"), AAD: []byte("1")}, {}, {Plaintext: []byte("c")}}
	wrapped, err := s.Batch(t.Context(), api.OpWrap, "shop", items)
	ok(t, err, "wrapping a batch")
	if len(wrapped) != 3 || wrapped[0].Error != nil || wrapped[2].Error != nil || wrapped[0].Version != 1 {
		t.Fatalf("wrapped %+v", wrapped)
	}
	if e := wrapped[1].Error; e == nil || e.Code != api.CodeBadRequest || e.Message == "" || wrapped[1].Wrapped != nil {
		t.Errorf("the item without plaintext gave %+v", wrapped[1])
	}
	back, err := s.Batch(t.Context(), api.OpUnwrap, "shop", []api.Item{
		{Wrapped: wrapped[2].Wrapped}, {Wrapped: wrapped[0].Wrapped, AAD: []byte("2")}, {Wrapped: wrapped[0].Wrapped, AAD: []byte("1")},
	})
	ok(t, err, "unwrapping a batch")
	if string(back[0].Plaintext) != "c" || back[1].Error == nil || back[1].Error.Code != api.CodeCorrupt || string(back[2].Plaintext) != "a" {
		t.Errorf("unwrapped %+v", back)
	}
	moved, err := s.Batch(t.Context(), api.OpRewrap, "shop", []api.Item{{Wrapped: wrapped[2].Wrapped}})
	ok(t, err, "rewrapping a batch")
	if moved[0].Error != nil || len(moved[0].Wrapped) == 0 || moved[0].Plaintext != nil {
		t.Errorf("rewrapped %+v", moved)
	}
	dks, err := s.Batch(t.Context(), api.OpDataKey, "shop", []api.Item{{}, {Bytes: 16, WrappedOnly: true}, {Bytes: -1}})
	ok(t, err, "making data keys")
	if len(dks[0].Plaintext) != 32 || dks[1].Plaintext != nil || len(dks[1].Wrapped) == 0 || dks[2].Error == nil {
		t.Errorf("data keys: %+v", dks)
	}
}

func batchLimits(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	items := make([]api.Item, api.MaxItems+1)
	for i := range items {
		items[i].Plaintext = []byte("p")
	}
	_, err := s.Batch(t.Context(), api.OpWrap, "shop", nil)
	wants(t, err, api.ErrBadRequest, "a batch of nothing")
	_, err = s.Batch(t.Context(), api.OpWrap, "shop", items)
	wants(t, err, api.ErrTooLarge, "a batch of 1001")
	results, err := s.Batch(t.Context(), api.OpWrap, "shop", items[:api.MaxItems])
	ok(t, err, "a batch of 1000")
	for i, r := range results {
		if r.Error != nil {
			t.Fatalf("item %d: %v", i, r.Error)
		}
	}
	_, err = s.Batch(t.Context(), "explode", "shop", items[:1])
	wants(t, err, api.ErrBadRequest, "an unknown operation")
}

func signatures(t *testing.T, s api.Service) {
	digest, other := sha256.Sum256([]byte("message")), sha256.Sum256([]byte("other"))
	make1(t, s, "ec", "ec-p256")
	make1(t, s, "rsa", "rsa-2048")
	for _, c := range []struct{ name, padding string }{{"ec", ""}, {"rsa", ""}, {"rsa", "pss"}, {"rsa", "pkcs1v15"}} {
		req := api.SignRequest{Digest: digest[:], Padding: c.padding}
		sig, err := s.Sign(t.Context(), c.name, req)
		ok(t, err, "signing with "+c.name+" "+c.padding)
		if sig.Version != 1 {
			t.Errorf("signed with version %d", sig.Version)
		}
		for _, v := range []struct {
			what   string
			digest []byte
			want   bool
		}{{"its digest", digest[:], true}, {"another digest", other[:], false}} {
			req.Digest = v.digest
			valid, err := s.VerifySignature(t.Context(), c.name, api.VerifyRequest{SignRequest: req, Signature: sig.Signature})
			if err != nil || valid != v.want {
				t.Errorf("verifying %s %s with %s: %t, %v", c.name, c.padding, v.what, valid, err)
			}
		}
	}
	_, err := s.Sign(t.Context(), "ec", api.SignRequest{Digest: digest[:5]})
	wants(t, err, api.ErrBadRequest, "signing half a digest")
}

func oaep(t *testing.T, s api.Service) {
	k := make1(t, s, "rsa", "rsa-2048")
	public, err := x509.ParsePKIXPublicKey(k.Versions[0].PublicKey)
	ok(t, err, "reading the public key")
	ciphertext, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public.(*rsa.PublicKey), []byte("plaintext"), nil)
	ok(t, err, "encrypting")
	p, err := s.Decrypt(t.Context(), "rsa", api.DecryptRequest{Ciphertext: ciphertext})
	var e *api.Error
	if errors.As(err, &e) && e.Code == api.CodeBadRequest && e.CKR != "" {
		t.Logf("this token has no OAEP with SHA-256: %v", err) // SoftHSM 2.6.1 knows SHA-1 only
		return
	}
	if err != nil || string(p) != "plaintext" {
		t.Errorf("decrypting: %q, %v", p, err)
	}
}

func macs(t *testing.T, s api.Service) {
	make1(t, s, "a", "hmac-sha256")
	make1(t, s, "b", "hmac-sha256")
	seen := make(map[string]bool)
	for _, c := range []struct{ name, message string }{{"a", "1"}, {"a", "2"}, {"b", "1"}} {
		m, err := s.MAC(t.Context(), c.name, api.MACRequest{Message: []byte(c.message)})
		ok(t, err, "computing a MAC")
		again, err := s.MAC(t.Context(), c.name, api.MACRequest{Message: []byte(c.message), Version: 1})
		ok(t, err, "computing it again")
		if len(m.MAC) != 32 || m.Version != 1 || !bytes.Equal(m.MAC, again.MAC) || seen[string(m.MAC)] {
			t.Errorf("MAC of %v: %x, then %x", c, m.MAC, again.MAC)
		}
		seen[string(m.MAC)] = true
	}
}

func concurrent(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for j := range 10 {
				p := fmt.Sprintf("plaintext %d.%d", i, j)
				wrapped, err := s.Wrap(t.Context(), "shop", []byte(p), nil)
				if err != nil {
					t.Errorf("wrapping: %v", err)
					return
				}
				back, err := s.Unwrap(t.Context(), "shop", wrapped, nil)
				if err != nil || string(back) != p {
					t.Errorf("unwrapping %s: %q, %v", p, back, err)
				}
			}
		})
	}
	wg.Wait()
}
