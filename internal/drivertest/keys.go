package drivertest

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"testing"

	"kmsd/pluginproto"
)

func asError(err error) (*pluginproto.Error, bool) {
	var e *pluginproto.Error
	ok := errors.As(err, &e)
	return e, ok
}

// testKey follows one key from its making to its end.
func (s *suite) testKey(t *testing.T, typ pluginproto.KeyType) {
	spec := pluginproto.KeySpec{ID: newID(), Type: typ, Label: "first label"}
	made, err := s.a.Generate(limit(t), spec)
	if err != nil {
		t.Fatalf("generating a key: %v", err)
	}
	removeLater(t, s.a, spec.ID)
	if made.ID != spec.ID || made.Type != typ || made.Label != spec.Label {
		t.Errorf("asked for %+v, got %+v", spec, made)
	}
	if len(made.CheckValue) != 8 {
		t.Errorf("the check value has %d bytes, want 8", len(made.CheckValue))
	}
	checkPublic(t, made)

	o, err := s.a.Inspect(limit(t), spec.ID)
	if err != nil {
		t.Fatalf("inspecting the key: %v", err)
	}
	sameObject(t, "inspected", o, made)
	o, ok := listed(t, s.a, spec.ID)
	if !ok {
		t.Fatal("the key is not listed")
	}
	sameObject(t, "listed", o, made)

	_, err = s.a.Generate(limit(t), spec)
	wantClass(t, err, pluginproto.ClassCaller)
	if o, err = s.a.Inspect(limit(t), spec.ID); err != nil {
		t.Fatalf("inspecting the key after a second generation was refused: %v", err)
	}
	sameObject(t, "after a second generation was refused", o, made)

	s.testAttributes(t, made)

	if err := s.a.Destroy(limit(t), spec.ID); err != nil {
		t.Fatalf("destroying the key: %v", err)
	}
	wantAbsent(t, s.a, spec.ID)
	wantClass(t, s.a.Destroy(limit(t), spec.ID), pluginproto.ClassNotFound)
}

func (s *suite) testAttributes(t *testing.T, made pluginproto.Object) {
	label := "second label, äöü"
	if err := s.a.SetAttributes(limit(t), made.ID, pluginproto.Attributes{Label: &label}); err != nil {
		t.Fatalf("setting the label: %v", err)
	}
	if err := s.a.SetAttributes(limit(t), made.ID, pluginproto.Attributes{}); err != nil {
		t.Errorf("setting nothing: %v", err)
	}
	o, err := s.a.Inspect(limit(t), made.ID)
	if err != nil {
		t.Fatalf("inspecting the key: %v", err)
	}
	want := made
	want.Label = label
	sameObject(t, "after setting the label", o, want)
}

// checkPublic says that a pair, and only a pair, has a public half that Go can read
// and that its check value is made of.
func checkPublic(t *testing.T, o pluginproto.Object) {
	t.Helper()
	if o.Type.Symmetric() {
		if len(o.Public) > 0 {
			t.Error("a secret key has a public half")
		}
		return
	}
	if _, err := x509.ParsePKIXPublicKey(o.Public); err != nil {
		t.Errorf("reading the public half: %v", err)
	}
	sum := sha256.Sum256(o.Public)
	if !bytes.Equal(o.CheckValue, sum[:8]) {
		t.Errorf("check value %x, want the start of SHA-256 of the public half, %x", o.CheckValue, sum[:8])
	}
}

func (s *suite) testAbsent(t *testing.T) {
	id := newID()
	label := "no such key"
	wantAbsent(t, s.a, id)
	wantClass(t, s.a.Destroy(limit(t), id), pluginproto.ClassNotFound)
	wantClass(t, s.a.SetAttributes(limit(t), id, pluginproto.Attributes{Label: &label}), pluginproto.ClassNotFound)
	_, err := s.a.CloneStep(limit(t), s.request(newID(), pluginproto.CloneSource, id))
	wantClass(t, err, pluginproto.ClassNotFound)
	_, err = s.a.Do(limit(t), encryptCommand(id, []byte("text"), nil))
	wantClass(t, err, pluginproto.ClassNotFound)
	_, err = s.a.Do(limit(t), pluginproto.Command{Op: pluginproto.OpMAC, Mech: pluginproto.HMAC, Key: id, Input: []byte("text")})
	wantClass(t, err, pluginproto.ClassNotFound)
}

// testWrong asks for what no driver does.
func (s *suite) testWrong(t *testing.T) {
	_, err := s.a.Generate(limit(t), pluginproto.KeySpec{ID: newID(), Type: "rot-13"})
	wantClass(t, err, pluginproto.ClassCaller)

	id := newID()
	digest := make([]byte, 32)
	for _, tc := range []struct {
		name string
		cmd  pluginproto.Command
	}{
		{"no operation", pluginproto.Command{Key: id}},
		{"an operation that is not in the contract", pluginproto.Command{Op: 99, Key: id}},
		{"an encryption without mechanism", pluginproto.Command{Op: pluginproto.OpEncrypt, Key: id}},
		{"an encryption with a signature mechanism", pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.ECDSA, Key: id}},
		{"a signature without hash", pluginproto.Command{Op: pluginproto.OpSign, Mech: pluginproto.ECDSA, Key: id, Input: digest}},
		{"a digest that does not fit its hash", pluginproto.Command{Op: pluginproto.OpSign, Mech: pluginproto.RSAPSS, Hash: pluginproto.SHA384, Key: id, Input: digest}},
		{"no random bytes", pluginproto.Command{Op: pluginproto.OpRandom}},
		{"too many random bytes", pluginproto.Command{Op: pluginproto.OpRandom, Length: pluginproto.MaxRandom + 1}},
		{"an input over the limit", pluginproto.Command{Op: pluginproto.OpMAC, Mech: pluginproto.HMAC, Key: id, Input: make([]byte, pluginproto.MaxInput+1)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := s.a.Do(limit(t), tc.cmd)
			wantClass(t, err, pluginproto.ClassCaller)
		})
	}
}
