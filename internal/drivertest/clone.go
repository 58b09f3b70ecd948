package drivertest

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"kmsd/pluginproto"
)

// relay copies a key from one driver to another as the core does. Each blob passes
// through alter, which also learns which end gave it and at which step; nil leaves
// them as they are.
func relay(t *testing.T, from, to pluginproto.Driver, transfer [16]byte, id pluginproto.KeyID,
	alter func(giver pluginproto.CloneRole, step int, blob []byte) []byte,
) (pluginproto.Object, error) {
	t.Helper()
	var blob []byte
	for step := range 16 {
		given, err := from.CloneStep(limit(t), pluginproto.CloneRequest{
			Transfer: transfer, Role: pluginproto.CloneSource, Step: step, Key: id, Blob: blob,
		})
		if err != nil {
			return pluginproto.Object{}, fmt.Errorf("source step %d: %w", step, err)
		}
		if step == 0 && (given.Object == nil || given.Object.ID != id || len(given.Object.CheckValue) == 0) {
			return pluginproto.Object{}, errors.New("the source does not show the object that it gives")
		}
		if alter != nil {
			given.Blob = alter(pluginproto.CloneSource, step, given.Blob)
		}
		taken, err := to.CloneStep(limit(t), pluginproto.CloneRequest{
			Transfer: transfer, Role: pluginproto.CloneTarget, Step: step, Key: id, Blob: given.Blob,
		})
		if err != nil {
			return pluginproto.Object{}, fmt.Errorf("target step %d: %w", step, err)
		}
		if taken.Done {
			if taken.Object == nil {
				return pluginproto.Object{}, errors.New("the target is done and shows no object")
			}
			return *taken.Object, nil
		}
		blob = taken.Blob
		if alter != nil {
			blob = alter(pluginproto.CloneTarget, step, blob)
		}
	}
	return pluginproto.Object{}, errors.New("the clone does not end")
}

// testClone copies a key and uses the copy.
func (s *suite) testClone(t *testing.T, typ pluginproto.KeyType) {
	made := generate(t, s.a, typ)
	copied, err := relay(t, s.a, s.b, newID(), made.ID, nil)
	if err != nil {
		t.Fatalf("cloning: %v", err)
	}
	removeLater(t, s.b, made.ID)
	sameObject(t, "the copy", copied, made)
	inspected, err := s.b.Inspect(limit(t), made.ID)
	if err != nil {
		t.Fatalf("inspecting the copy: %v", err)
	}
	sameObject(t, "the copy, inspected", inspected, made)

	again, err := relay(t, s.a, s.b, newID(), made.ID, nil)
	if err != nil {
		t.Fatalf("cloning a second time: %v", err)
	}
	sameObject(t, "the copy, cloned again", again, made)
	s.compare(t, made)
	s.cloneBack(t, made)
}

// compare has one end undo what the other has done.
func (s *suite) compare(t *testing.T, o pluginproto.Object) {
	switch {
	case o.Type == pluginproto.HMACSHA256:
		cmd := pluginproto.Command{Op: pluginproto.OpMAC, Mech: pluginproto.HMAC, Key: o.ID, Input: []byte("message")}
		if !bytes.Equal(do(t, s.a, cmd).Output, do(t, s.b, cmd).Output) {
			t.Error("key and copy make different MACs")
		}
	case o.Type.Symmetric():
		text := []byte("32 bytes of somebody's table key")
		cmd := encryptCommand(o.ID, text, []byte("context"))
		if opened := do(t, s.b, decryptOf(cmd, do(t, s.a, cmd))); !bytes.Equal(opened.Output, text) {
			t.Error("the copy does not decrypt what the key has encrypted")
		}
	default:
		mech := pluginproto.RSAPSS
		switch o.Type {
		case pluginproto.ECP256, pluginproto.ECP384, pluginproto.ECP521:
			mech = pluginproto.ECDSA
		}
		cmd := pluginproto.Command{
			Op: pluginproto.OpSign, Mech: mech, Hash: pluginproto.SHA256, Key: o.ID,
			Input: digest(pluginproto.SHA256, "a message"),
		}
		signature := do(t, s.b, cmd).Output
		cmd.Op, cmd.Signature = pluginproto.OpVerify, signature
		do(t, s.a, cmd)
	}
}

// cloneBack shows that a copy is as good a source as the key.
func (s *suite) cloneBack(t *testing.T, made pluginproto.Object) {
	if err := s.a.Destroy(limit(t), made.ID); err != nil {
		t.Fatalf("destroying the key: %v", err)
	}
	back, err := relay(t, s.b, s.a, newID(), made.ID, nil)
	if err != nil {
		t.Fatalf("cloning the copy back: %v", err)
	}
	sameObject(t, "the copy of the copy", back, made)
}

// testAlteredClones tries to put something else than a true copy on a token.
func (s *suite) testAlteredClones(t *testing.T) {
	for _, typ := range []pluginproto.KeyType{pluginproto.AES256, s.cfg.Types[len(s.cfg.Types)-1]} {
		made := generate(t, s.a, typ)
		removeLater(t, s.b, made.ID)
		t.Run("flipped bits, "+string(typ), func(t *testing.T) { s.flippedClone(t, made) })
		t.Run("blobs cut short, "+string(typ), func(t *testing.T) {
			for _, keep := range []int{0, 1, 8} {
				_, err := relay(t, s.a, s.b, newID(), made.ID, func(_ pluginproto.CloneRole, _ int, blob []byte) []byte {
					return blob[:min(keep, len(blob))]
				})
				s.refusedClone(t, err, made.ID)
			}
		})
	}
	made := generate(t, s.a, pluginproto.AES256)
	removeLater(t, s.b, made.ID)
	t.Run("a blob of another transfer", func(t *testing.T) {
		first, err := s.a.CloneStep(limit(t), pluginproto.CloneRequest{Transfer: newID(), Role: pluginproto.CloneSource, Key: made.ID})
		if err != nil {
			t.Fatalf("source step 0: %v", err)
		}
		_, err = s.b.CloneStep(limit(t), pluginproto.CloneRequest{
			Transfer: newID(), Role: pluginproto.CloneTarget, Key: made.ID, Blob: first.Blob,
		})
		s.refusedClone(t, err, made.ID)
	})
	t.Run("a blob of another key", func(t *testing.T) {
		transfer, other := newID(), newID()
		first, err := s.a.CloneStep(limit(t), pluginproto.CloneRequest{Transfer: transfer, Role: pluginproto.CloneSource, Key: made.ID})
		if err != nil {
			t.Fatalf("source step 0: %v", err)
		}
		_, err = s.b.CloneStep(limit(t), pluginproto.CloneRequest{
			Transfer: transfer, Role: pluginproto.CloneTarget, Key: other, Blob: first.Blob,
		})
		s.refusedClone(t, err, other)
	})
	t.Run("steps out of order", func(t *testing.T) {
		for _, role := range []pluginproto.CloneRole{pluginproto.CloneSource, pluginproto.CloneTarget} {
			for _, step := range []int{1, 5} {
				_, err := s.b.CloneStep(limit(t), pluginproto.CloneRequest{
					Transfer: newID(), Role: role, Step: step, Key: made.ID, Blob: make([]byte, 64),
				})
				s.refusedClone(t, err, made.ID)
			}
		}
	})
	t.Run("another domain", func(t *testing.T) {
		stranger, _ := open(t, s.cfg.NewToken(t), newDomain())
		_, err := relay(t, s.a, stranger, newID(), made.ID, nil)
		if err == nil {
			t.Error("a token of another domain has taken the key")
		}
		wantAbsent(t, stranger, made.ID)
		req := pluginproto.CloneRequest{Transfer: newID(), Role: pluginproto.CloneSource, Key: made.ID}
		given, err := s.a.CloneStep(limit(t), req)
		if err != nil {
			t.Fatalf("source step 0: %v", err)
		}
		req.Role, req.Blob, req.Prove = pluginproto.CloneTarget, given.Blob, true
		s.notProved(t, stranger, req)
	})
	t.Run("another key under the identity", func(t *testing.T) {
		taken, err := s.b.Generate(limit(t), pluginproto.KeySpec{ID: made.ID, Type: pluginproto.AES256, Label: "taken"})
		if err != nil {
			t.Fatalf("generating a key: %v", err)
		}
		if _, err := relay(t, s.a, s.b, newID(), made.ID, nil); err == nil {
			t.Error("the clone was accepted")
		}
		o, err := s.b.Inspect(limit(t), made.ID)
		if err != nil {
			t.Fatalf("inspecting the key that was there first: %v", err)
		}
		sameObject(t, "the key that was there first", o, taken)
	})
}

// flippedClone flips one bit in each blob of the protocol, in several places. A flip
// that does no harm may go unnoticed, but what lands is a true copy or nothing.
func (s *suite) flippedClone(t *testing.T, made pluginproto.Object) {
	for victim := range 4 {
		for _, at := range []func(n int) int{
			func(int) int { return 0 },
			func(n int) int { return n / 2 },
			func(n int) int { return n - 1 },
		} {
			blobs, altered := 0, false
			o, err := relay(t, s.a, s.b, newID(), made.ID, func(_ pluginproto.CloneRole, _ int, blob []byte) []byte {
				if blobs++; blobs-1 != victim || len(blob) == 0 {
					return blob
				}
				altered = true
				return flipped(blob, at(len(blob)))
			})
			if !altered {
				break // the protocol has fewer blobs
			}
			if err == nil {
				sameObject(t, "a clone in spite of a flipped bit", o, made)
				if err := s.b.Destroy(limit(t), made.ID); err != nil {
					t.Fatalf("destroying the copy: %v", err)
				}
				continue
			}
			s.refusedClone(t, err, made.ID)
		}
		if err := s.b.Destroy(limit(t), made.ID); err != nil && pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
			t.Fatalf("destroying the copy: %v", err)
		}
	}
}

// refusedClone says that a clone has failed, without a claim that something is
// absent, and left nothing behind.
func (s *suite) refusedClone(t *testing.T, err error, id pluginproto.KeyID) {
	t.Helper()
	if err == nil {
		t.Error("the clone was accepted")
	}
	if _, inspectErr := s.b.Inspect(limit(t), id); pluginproto.ClassOf(inspectErr) != pluginproto.ClassNotFound {
		t.Errorf("inspecting at the target: %v, want that nothing is there", inspectErr)
	}
}
