package drivertest

import (
	"testing"

	"kmsd/pluginproto"
)

// testProof has a target prove what a blob holds. A driver whose clones have more than
// one step refuses it; both leave the token as it was.
func (s *suite) testProof(t *testing.T, typ pluginproto.KeyType) {
	made := s.made[typ]
	transfer := newID()
	given, err := s.a.CloneStep(limit(t), s.request(transfer, pluginproto.CloneSource, made.ID))
	if err != nil {
		t.Fatalf("source step 0: %v", err)
	}
	req := s.request(transfer, pluginproto.CloneTarget, made.ID)
	req.Blob, req.Prove = given.Blob, true
	if !given.Done {
		_, err := s.b.CloneStep(limit(t), req)
		wantClass(t, err, pluginproto.ClassCaller)
		wantAbsent(t, s.b, made.ID)
		return
	}
	t.Run("a true blob", func(t *testing.T) {
		for range 2 { // it is not used up
			s.proved(t, s.b, req, made)
			wantAbsent(t, s.b, made.ID)
		}
		s.proved(t, s.a, req, made)
		inspected, err := s.a.Inspect(limit(t), made.ID)
		if err != nil {
			t.Fatalf("inspecting the key: %v", err)
		}
		sameObject(t, "the key on a token that has proved it", inspected, made)
	})
	t.Run("blobs that are not true", func(t *testing.T) { s.testFalseProofs(t, req) })
	t.Run("beside another key", func(t *testing.T) {
		removeLater(t, s.b, made.ID)
		taken, err := s.b.Generate(limit(t), pluginproto.KeySpec{ID: made.ID, Type: pluginproto.AES256, Label: "taken"})
		if err != nil {
			t.Fatalf("generating a key: %v", err)
		}
		s.proved(t, s.b, req, made)
		o, err := s.b.Inspect(limit(t), made.ID)
		if err != nil {
			t.Fatalf("inspecting the key that was there first: %v", err)
		}
		sameObject(t, "the key that was there first", o, taken)
	})
}

// proved wants a proof to succeed.
func (s *suite) proved(t *testing.T, d pluginproto.Driver, req pluginproto.CloneRequest, made pluginproto.Object) {
	t.Helper()
	reply, err := d.CloneStep(limit(t), req)
	if err != nil {
		t.Fatalf("proving: %v", err)
	}
	if !reply.Done || len(reply.Keys) != 1 || reply.Keys[0].Object == nil {
		t.Fatalf("the proof is done: %v, with %v", reply.Done, reply.Keys)
	}
	sameObject(t, "what was proved", *reply.Keys[0].Object, made)
}

// testFalseProofs wants a proof refused.
func (s *suite) testFalseProofs(t *testing.T, good pluginproto.CloneRequest) {
	for _, c := range []struct {
		name  string
		alter func(*pluginproto.CloneRequest)
	}{
		{"one with its first bit flipped", func(r *pluginproto.CloneRequest) { r.Blob = flipped(r.Blob, 0) }},
		{"one with a bit flipped in the middle", func(r *pluginproto.CloneRequest) { r.Blob = flipped(r.Blob, len(r.Blob)/2) }},
		{"one with its last bit flipped", func(r *pluginproto.CloneRequest) { r.Blob = flipped(r.Blob, len(r.Blob)-1) }},
		{"one that is cut short", func(r *pluginproto.CloneRequest) { r.Blob = r.Blob[:len(r.Blob)-1] }},
		{"nothing", func(r *pluginproto.CloneRequest) { r.Blob = nil }},
		{"one of another transfer", func(r *pluginproto.CloneRequest) { r.Transfer = newID() }},
		{"one of another key", func(r *pluginproto.CloneRequest) { r.Keys = []pluginproto.KeyID{newID()} }},
		{"one that comes late", func(r *pluginproto.CloneRequest) { r.Step = 1 }},
		{"one for a source", func(r *pluginproto.CloneRequest) { r.Role = pluginproto.CloneSource }},
	} {
		t.Run(c.name, func(t *testing.T) {
			req := good
			c.alter(&req)
			s.notProved(t, s.b, req)
			wantAbsent(t, s.b, good.Keys[0])
		})
	}
}

// notProved wants a proof refused, without a word about the token or about absence.
func (s *suite) notProved(t *testing.T, d pluginproto.Driver, req pluginproto.CloneRequest) {
	t.Helper()
	reply, err := d.CloneStep(limit(t), req)
	if err == nil {
		t.Errorf("it was proved: %+v", reply)
	}
	if class := pluginproto.ClassOf(err); class == pluginproto.ClassMember || class == pluginproto.ClassNotFound {
		t.Errorf("error %q is of class %s", err, class)
	}
	wantAbsent(t, d, req.Keys[0])
}
