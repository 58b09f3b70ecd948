package drivertest

import (
	"testing"

	"kmsd/pluginproto"
)

// testAlteredClones tries to put something else than a true copy on a token.
func (s *suite) testAlteredClones(t *testing.T) {
	for _, typ := range []pluginproto.KeyType{pluginproto.AES256, s.cfg.Types[len(s.cfg.Types)-1]} {
		made := s.made[typ]
		removeLater(t, s.b, made.ID)
		t.Run("flipped bits, "+string(typ), func(t *testing.T) { s.flippedClone(t, made) })
		t.Run("blobs cut short, "+string(typ), func(t *testing.T) {
			for _, keep := range []int{0, 1, 8} {
				_, err := s.relay(t, s.a, s.b, made.ID, func(_ pluginproto.CloneRole, _ int, blob []byte) []byte {
					return blob[:min(keep, len(blob))]
				})
				s.refusedClone(t, err, made.ID)
			}
		})
	}
	made := generate(t, s.a, pluginproto.AES256)
	removeLater(t, s.b, made.ID)
	t.Run("a blob of another transfer", func(t *testing.T) {
		first, err := s.a.CloneStep(limit(t), s.request(newID(), pluginproto.CloneSource, made.ID))
		if err != nil {
			t.Fatalf("source step 0: %v", err)
		}
		_, err = s.b.CloneStep(limit(t), withBlob(s.request(newID(), pluginproto.CloneTarget, made.ID), first.Blob))
		s.refusedClone(t, err, made.ID)
	})
	t.Run("a blob of another key", func(t *testing.T) {
		transfer, other := newID(), newID()
		first, err := s.a.CloneStep(limit(t), s.request(transfer, pluginproto.CloneSource, made.ID))
		if err != nil {
			t.Fatalf("source step 0: %v", err)
		}
		_, err = s.b.CloneStep(limit(t), withBlob(s.request(transfer, pluginproto.CloneTarget, other), first.Blob))
		s.refusedClone(t, err, other)
	})
	t.Run("steps out of order", func(t *testing.T) {
		for _, role := range []pluginproto.CloneRole{pluginproto.CloneSource, pluginproto.CloneTarget} {
			for _, step := range []int{1, 5} {
				req := withBlob(s.request(newID(), role, made.ID), make([]byte, 64))
				req.Step = step
				_, err := s.b.CloneStep(limit(t), req)
				s.refusedClone(t, err, made.ID)
			}
		}
	})
	t.Run("a step that is left out", func(t *testing.T) { s.skippedStep(t, made) })
	t.Run("another protocol", func(t *testing.T) {
		req := s.request(newID(), pluginproto.CloneSource, made.ID)
		req.Protocol = "unheard-of"
		_, err := s.a.CloneStep(limit(t), req)
		wantClass(t, err, pluginproto.ClassCaller)
	})
	t.Run("another domain", func(t *testing.T) {
		stranger, _ := open(t, s.cfg.NewToken(t), newDomain())
		_, err := s.relay(t, s.a, stranger, made.ID, nil)
		if err == nil {
			t.Error("a token of another domain has taken the key")
		}
		wantAbsent(t, stranger, made.ID)
		req := s.request(newID(), pluginproto.CloneSource, made.ID)
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
		if _, err := s.relay(t, s.a, s.b, made.ID, nil); err == nil {
			t.Error("the clone was accepted")
		}
		o, err := s.b.Inspect(limit(t), made.ID)
		if err != nil {
			t.Fatalf("inspecting the key that was there first: %v", err)
		}
		sameObject(t, "the key that was there first", o, taken)
	})
}

// skippedStep goes on with a transfer at the wrong place.
func (s *suite) skippedStep(t *testing.T, made pluginproto.Object) {
	if s.way.Alone {
		return // there is one step at each end
	}
	transfer := newID()
	source := s.request(transfer, pluginproto.CloneSource, made.ID)
	target := s.request(transfer, pluginproto.CloneTarget, made.ID)
	defer s.end(t, s.a, source)
	defer s.end(t, s.b, target)
	given, err := s.a.CloneStep(limit(t), source)
	if err != nil {
		t.Fatalf("source step 0: %v", err)
	}
	taken, err := s.b.CloneStep(limit(t), withBlob(target, given.Blob))
	if err != nil {
		t.Fatalf("target step 0: %v", err)
	}
	source = withBlob(source, taken.Blob)
	source.Step = 2
	_, err = s.a.CloneStep(limit(t), source)
	s.refusedClone(t, err, made.ID)
	late := withBlob(target, given.Blob)
	late.Step = 2
	_, err = s.b.CloneStep(limit(t), late)
	s.refusedClone(t, err, made.ID)
}

func withBlob(req pluginproto.CloneRequest, blob []byte) pluginproto.CloneRequest {
	req.Blob = blob
	return req
}

// flippedClone flips one bit in each blob of the protocol, in several places. A flip
// that does no harm may go unnoticed, but what lands is a true copy or nothing.
func (s *suite) flippedClone(t *testing.T, made pluginproto.Object) {
	for victim := range 8 {
		for _, at := range []func(n int) int{
			func(int) int { return 0 },
			func(n int) int { return n / 2 },
			func(n int) int { return n - 1 },
		} {
			blobs, altered := 0, false
			o, err := s.relay(t, s.a, s.b, made.ID, func(_ pluginproto.CloneRole, _ int, blob []byte) []byte {
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
