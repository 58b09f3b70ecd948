package drivertest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"fmt"
	"math/big"
	"testing"

	"kmsd/pluginproto"
)

func encryptCommand(id pluginproto.KeyID, text, aad []byte) pluginproto.Command {
	iv := make([]byte, pluginproto.GCMIVSize)
	rand.Read(iv) // never fails
	return pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: id, Input: text, IV: iv, AAD: aad}
}

// testUse does with one key what its type is for.
func (s *suite) testUse(t *testing.T, typ pluginproto.KeyType) {
	o := s.made[typ]
	switch {
	case typ == pluginproto.HMACSHA256:
		s.useMAC(t, o)
	case typ.Symmetric():
		s.useCipher(t, o)
	default:
		s.usePair(t, o)
	}
}

func do(t *testing.T, d pluginproto.Driver, cmd pluginproto.Command) pluginproto.Result {
	t.Helper()
	r, err := d.Do(limit(t), cmd)
	if err != nil {
		t.Fatalf("command %d: %v", cmd.Op, err)
	}
	return r
}

func (s *suite) useCipher(t *testing.T, o pluginproto.Object) {
	text, aad := []byte("32 bytes of somebody's table key"), []byte("context")
	cmd := encryptCommand(o.ID, text, aad)
	sealed := do(t, s.a, cmd)
	if len(sealed.Output) != len(text)+pluginproto.GCMTagSize || !pluginproto.GCMIV(len(sealed.IV)) {
		t.Fatalf("ciphertext of %d bytes with an IV of %d", len(sealed.Output), len(sealed.IV))
	}
	if !bytes.Equal(text, []byte("32 bytes of somebody's table key")) {
		t.Error("the driver has written into the input")
	}
	opened := do(t, s.a, decryptOf(cmd, sealed))
	if !bytes.Equal(opened.Output, text) {
		t.Errorf("%q came back, want %q", opened.Output, text)
	}
	// A token takes the IV that it is given, or says which one of its own it took.
	if again := do(t, s.a, cmd); bytes.Equal(sealed.IV, cmd.IV) != bytes.Equal(again.Output, sealed.Output) ||
		bytes.Equal(again.IV, sealed.IV) != bytes.Equal(again.Output, sealed.Output) {
		t.Errorf("encrypted twice with the IV %x: the first answer was %x with %x, the second %x with %x",
			cmd.IV, sealed.Output, sealed.IV, again.Output, again.IV)
	}
	_, err := s.a.Do(limit(t), pluginproto.Command{Op: pluginproto.OpMAC, Mech: pluginproto.HMAC, Key: o.ID, Input: text})
	wantClass(t, err, pluginproto.ClassCaller)
	t.Run("many items", func(t *testing.T) { s.useItems(t, o.ID) })
}

// useItems does many in one command, of which one does not authenticate.
func (s *suite) useItems(t *testing.T, id pluginproto.KeyID) {
	const n, bad = 40, 17
	text := func(i int) []byte { return bytes.Repeat([]byte{byte(i)}, 1+i) }
	seal := pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: id}
	for i := range n {
		one := encryptCommand(id, text(i), fmt.Append(nil, "context of ", i))
		seal.Items = append(seal.Items, pluginproto.Item{Input: one.Input, IV: one.IV, AAD: one.AAD})
	}
	sealed := do(t, s.a, seal)
	if len(sealed.Items) != n || len(sealed.Output) != 0 {
		t.Fatalf("%d answers to %d items, and %d bytes beside them", len(sealed.Items), n, len(sealed.Output))
	}
	open := pluginproto.Command{Op: pluginproto.OpDecrypt, Mech: pluginproto.AESGCM, Key: id}
	for i, it := range sealed.Items {
		if it.Err != nil || !bytes.Equal(seal.Items[i].Input, text(i)) {
			t.Fatalf("item %d: %v; its input is %x now", i, it.Err, seal.Items[i].Input)
		}
		open.Items = append(open.Items, pluginproto.Item{Input: it.Output, IV: it.IV, AAD: seal.Items[i].AAD})
	}
	open.Items[bad].Input = flipped(open.Items[bad].Input, 0)
	for i, it := range do(t, s.a, open).Items {
		switch {
		case i == bad:
			wantCKR(t, it.Err, pluginproto.ClassCaller, pluginproto.CKREncryptedDataInvalid)
		case it.Err != nil || !bytes.Equal(it.Output, text(i)):
			t.Errorf("item %d came back as %x, %v", i, it.Output, it.Err)
		}
	}
	open.Key = newID()
	_, err := s.a.Do(limit(t), open)
	wantClass(t, err, pluginproto.ClassNotFound)
}

func decryptOf(cmd pluginproto.Command, sealed pluginproto.Result) pluginproto.Command {
	cmd.Op, cmd.Input, cmd.IV = pluginproto.OpDecrypt, sealed.Output, sealed.IV
	return cmd
}

func (s *suite) useMAC(t *testing.T, o pluginproto.Object) {
	for _, n := range []int{0, 1, 64, 5000} {
		cmd := pluginproto.Command{Op: pluginproto.OpMAC, Mech: pluginproto.HMAC, Key: o.ID, Input: make([]byte, n)}
		sum := do(t, s.a, cmd)
		if len(sum.Output) != sha256.Size {
			t.Fatalf("MAC of %d bytes", len(sum.Output))
		}
		if again := do(t, s.a, cmd); !bytes.Equal(again.Output, sum.Output) {
			t.Error("two MACs of one message differ")
		}
		cmd.Op, cmd.Signature = pluginproto.OpVerify, sum.Output
		do(t, s.a, cmd)
		cmd.Signature = flipped(sum.Output, 0)
		_, err := s.a.Do(limit(t), cmd)
		wantCKR(t, err, pluginproto.ClassCaller, pluginproto.CKRSignatureInvalid)
	}
}

func (s *suite) usePair(t *testing.T, o pluginproto.Object) {
	parsed, err := x509.ParsePKIXPublicKey(o.Public)
	if err != nil {
		t.Fatalf("reading the public half: %v", err)
	}
	hashes := []pluginproto.Hash{pluginproto.SHA256, pluginproto.SHA384, pluginproto.SHA512}
	mechs := []pluginproto.Mechanism{pluginproto.ECDSA}
	if _, ok := parsed.(*rsa.PublicKey); ok {
		mechs = []pluginproto.Mechanism{pluginproto.RSAPKCS1v15, pluginproto.RSAPSS}
	}
	for _, mech := range mechs {
		for _, hash := range hashes {
			t.Run(fmt.Sprintf("mechanism %d with a digest of %d bytes", mech, hash.Size()), func(t *testing.T) {
				s.sign(t, o.ID, parsed, mech, hash)
			})
		}
	}
	if public, ok := parsed.(*rsa.PublicKey); ok {
		s.decryptOAEP(t, o.ID, public)
	}
}

func (s *suite) sign(t *testing.T, id pluginproto.KeyID, public any, mech pluginproto.Mechanism, hash pluginproto.Hash) {
	cmd := pluginproto.Command{Op: pluginproto.OpSign, Mech: mech, Hash: hash, Key: id, Input: digest(hash, "a message")}
	signature := do(t, s.a, cmd).Output
	if !verifies(public, mech, hash, cmd.Input, signature) {
		t.Fatal("Go does not verify the signature")
	}
	cmd.Op, cmd.Signature = pluginproto.OpVerify, signature
	do(t, s.a, cmd)
	for name, wrong := range map[string]pluginproto.Command{
		"of an altered signature": {Op: cmd.Op, Mech: mech, Hash: hash, Key: id, Input: cmd.Input, Signature: flipped(signature, len(signature)-1)},
		"of another message":      {Op: cmd.Op, Mech: mech, Hash: hash, Key: id, Input: digest(hash, "another message"), Signature: signature},
		"of a short signature":    {Op: cmd.Op, Mech: mech, Hash: hash, Key: id, Input: cmd.Input, Signature: signature[:8]},
		"of no signature":         {Op: cmd.Op, Mech: mech, Hash: hash, Key: id, Input: cmd.Input},
	} {
		t.Run("verification "+name, func(t *testing.T) {
			_, err := s.a.Do(limit(t), wrong)
			wantCKR(t, err, pluginproto.ClassCaller, pluginproto.CKRSignatureInvalid)
		})
	}
}

func digest(hash pluginproto.Hash, message string) []byte {
	switch hash {
	case pluginproto.SHA384:
		sum := sha512.Sum384([]byte(message))
		return sum[:]
	case pluginproto.SHA512:
		sum := sha512.Sum512([]byte(message))
		return sum[:]
	default:
		sum := sha256.Sum256([]byte(message))
		return sum[:]
	}
}

func verifies(public any, mech pluginproto.Mechanism, hash pluginproto.Hash, sum, signature []byte) bool {
	h := map[pluginproto.Hash]crypto.Hash{
		pluginproto.SHA256: crypto.SHA256,
		pluginproto.SHA384: crypto.SHA384,
		pluginproto.SHA512: crypto.SHA512,
	}[hash]
	switch public := public.(type) {
	case *rsa.PublicKey:
		if mech == pluginproto.RSAPSS {
			return rsa.VerifyPSS(public, h, sum, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(public, h, sum, signature) == nil
	case *ecdsa.PublicKey:
		n := (public.Curve.Params().BitSize + 7) / 8
		return len(signature) == 2*n && ecdsa.Verify(public, sum,
			new(big.Int).SetBytes(signature[:n]), new(big.Int).SetBytes(signature[n:]))
	default:
		return false
	}
}

func (s *suite) decryptOAEP(t *testing.T, id pluginproto.KeyID, public *rsa.PublicKey) {
	text := []byte("32 bytes of somebody's table key")
	sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, text, nil)
	if err != nil {
		t.Fatalf("encrypting: %v", err)
	}
	cmd := pluginproto.Command{Op: pluginproto.OpDecrypt, Mech: pluginproto.RSAOAEP, Hash: pluginproto.SHA256, Key: id, Input: sealed}
	if opened := do(t, s.a, cmd); !bytes.Equal(opened.Output, text) {
		t.Errorf("OAEP gave %q, want %q", opened.Output, text)
	}
	for _, wrong := range [][]byte{flipped(sealed, len(sealed)-1), sealed[:8], nil} {
		cmd.Input = wrong
		_, err := s.a.Do(limit(t), cmd)
		wantCKR(t, err, pluginproto.ClassCaller, pluginproto.CKREncryptedDataInvalid)
	}
}

// testGCM goes to the edges of what is encrypted, and alters every part of it.
func (s *suite) testGCM(t *testing.T) {
	id := generate(t, s.a, pluginproto.AES256).ID
	for _, size := range []int{0, 1, 15, 16, 17, 32, 4096, 64 << 10} {
		for _, aad := range [][]byte{nil, []byte("a"), make([]byte, 1000)} {
			cmd := encryptCommand(id, make([]byte, size), aad)
			sealed := do(t, s.a, cmd)
			if opened := do(t, s.a, decryptOf(cmd, sealed)); !bytes.Equal(opened.Output, cmd.Input) {
				t.Errorf("%d bytes with %d of additional data did not come back", size, len(aad))
			}
		}
	}
	text := []byte("32 bytes of somebody's table key")
	cmd := encryptCommand(id, text, []byte("context"))
	sealed := do(t, s.a, cmd)
	good := decryptOf(cmd, sealed)
	other := generate(t, s.a, pluginproto.AES256).ID
	for _, tc := range []struct {
		name  string
		alter func(*pluginproto.Command)
	}{
		{"the first bit of the ciphertext", func(c *pluginproto.Command) { c.Input = flipped(c.Input, 0) }},
		{"the last bit of the tag", func(c *pluginproto.Command) { c.Input = flipped(c.Input, len(c.Input)-1) }},
		{"the IV", func(c *pluginproto.Command) { c.IV = flipped(c.IV, 3) }},
		{"the additional data", func(c *pluginproto.Command) { c.AAD = []byte("Context") }},
		{"the additional data, left out", func(c *pluginproto.Command) { c.AAD = nil }},
		{"the key", func(c *pluginproto.Command) { c.Key = other }},
	} {
		t.Run("altered: "+tc.name, func(t *testing.T) {
			bad := good
			tc.alter(&bad)
			_, err := s.a.Do(limit(t), bad)
			wantCKR(t, err, pluginproto.ClassCaller, pluginproto.CKREncryptedDataInvalid)
		})
	}
	t.Run("truncated", func(t *testing.T) {
		for n := range 33 {
			bad := good
			bad.Input = good.Input[:n]
			_, err := s.a.Do(limit(t), bad)
			wantCKR(t, err, pluginproto.ClassCaller, pluginproto.CKREncryptedDataInvalid)
		}
	})
	t.Run("a long IV is for decrypting only", func(t *testing.T) {
		bad := cmd
		bad.IV = make([]byte, pluginproto.GCMLongIVSize)
		_, err := s.a.Do(limit(t), bad)
		wantClass(t, err, pluginproto.ClassCaller)
		bad = good
		bad.IV = bytes.Repeat([]byte{1}, pluginproto.GCMLongIVSize)
		_, err = s.a.Do(limit(t), bad) // a proper question, but not its IV
		wantCKR(t, err, pluginproto.ClassCaller, pluginproto.CKREncryptedDataInvalid)
	})
	t.Run("an IV of another size", func(t *testing.T) {
		for _, n := range []int{0, 1, 11, 13, 15, 17} {
			for _, bad := range []pluginproto.Command{cmd, good} {
				bad.IV = make([]byte, n)
				_, err := s.a.Do(limit(t), bad)
				wantClass(t, err, pluginproto.ClassCaller)
			}
		}
	})
	if opened := do(t, s.a, good); !bytes.Equal(opened.Output, text) {
		t.Error("the unaltered ciphertext is not decrypted any more")
	}
}

func (s *suite) testRandom(t *testing.T) {
	for _, n := range []int{1, 32, 4096, pluginproto.MaxRandom} {
		cmd := pluginproto.Command{Op: pluginproto.OpRandom, Length: n}
		first, second := do(t, s.a, cmd).Output, do(t, s.a, cmd).Output
		if len(first) != n || len(second) != n {
			t.Errorf("%d and %d random bytes, want %d", len(first), len(second), n)
		}
		if n >= 32 && bytes.Equal(first, second) {
			t.Error("twice the same random bytes")
		}
	}
	for range 3 {
		if r := do(t, s.a, pluginproto.Command{Op: pluginproto.OpProbe}); len(r.Output) != 0 {
			t.Errorf("a probe gave %d bytes", len(r.Output))
		}
	}
}

func flipped(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 1
	return b
}
