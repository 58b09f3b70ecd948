package drivertest

import (
	"testing"

	"kmsd/pluginproto"
)

// testCloneMany copies several keys in one transfer, one of which is not there, and one
// which the target holds already.
func (s *suite) testCloneMany(t *testing.T) {
	if s.way.Keys == 1 {
		made := generate(t, s.a, s.cfg.Types[0])
		_, err := s.a.CloneStep(limit(t), s.request(newID(), pluginproto.CloneSource, made.ID, newID()))
		wantClass(t, err, pluginproto.ClassCaller)
		return
	}
	var made []pluginproto.Object
	var ids []pluginproto.KeyID
	for i := range min(4, s.way.Keys) {
		o := generate(t, s.a, s.cfg.Types[i%len(s.cfg.Types)])
		removeLater(t, s.b, o.ID)
		made, ids = append(made, o), append(ids, o.ID)
	}
	if _, err := s.relay(t, s.a, s.b, ids[0], nil); err != nil {
		t.Fatalf("cloning the first: %v", err)
	}
	results, err := s.relayAll(t, s.a, s.b, newID(), ids, nil)
	if err != nil {
		t.Fatalf("cloning %d keys: %v", len(ids), err)
	}
	for i, r := range results {
		if r.Err != nil || r.Object == nil {
			t.Fatalf("key %d: %+v", i, r)
		}
		sameObject(t, "a copy", *r.Object, made[i])
		inspected, err := s.b.Inspect(limit(t), ids[i])
		if err != nil {
			t.Fatalf("inspecting copy %d: %v", i, err)
		}
		sameObject(t, "a copy, inspected", inspected, made[i])
	}
	s.showsWhatIsMissing(t, ids)
}

// showsWhatIsMissing wants a source to say of each key whether it can give it.
func (s *suite) showsWhatIsMissing(t *testing.T, ids []pluginproto.KeyID) {
	req := s.request(newID(), pluginproto.CloneSource, append([]pluginproto.KeyID{newID()}, ids[1:]...)...)
	defer s.end(t, s.a, req)
	given, err := s.a.CloneStep(limit(t), req)
	if err != nil {
		t.Fatalf("source step 0 with a key that is not there: %v", err)
	}
	if len(given.Keys) != len(ids) {
		t.Fatalf("it shows %d keys of %d", len(given.Keys), len(ids))
	}
	wantClass(t, given.Keys[0].Err, pluginproto.ClassNotFound)
	for _, k := range given.Keys[1:] {
		if k.Err != nil || k.Object == nil {
			t.Errorf("a key that is there: %+v", k)
		}
	}
}

// testAbandonedClone leaves a transfer after each of its steps: nothing of it stays, and
// the next one works.
func (s *suite) testAbandonedClone(t *testing.T) {
	made := generate(t, s.a, s.cfg.Types[0])
	removeLater(t, s.b, made.ID)
	for calls := range 6 {
		if done := s.relayUntil(t, made.ID, calls); done {
			break
		}
		wantAbsent(t, s.b, made.ID)
	}
	copied, err := s.relay(t, s.a, s.b, made.ID, nil)
	if err != nil {
		t.Fatalf("cloning after transfers that were left alone: %v", err)
	}
	sameObject(t, "the copy", copied, made)
}

// relayUntil begins a transfer and stops after some calls, without a word. It reports
// whether it was done by then.
func (s *suite) relayUntil(t *testing.T, id pluginproto.KeyID, calls int) (done bool) {
	transfer := newID()
	source, target := s.request(transfer, pluginproto.CloneSource, id), s.request(transfer, pluginproto.CloneTarget, id)
	for call := range calls {
		if call%2 == 0 {
			given, err := s.a.CloneStep(limit(t), source)
			if err != nil {
				t.Fatalf("source step %d: %v", source.Step, err)
			}
			target.Blob = given.Blob
			source.Step++
			continue
		}
		taken, err := s.b.CloneStep(limit(t), target)
		if err != nil {
			t.Fatalf("target step %d: %v", target.Step, err)
		}
		if taken.Done {
			return true
		}
		source.Blob = taken.Blob
		target.Step++
	}
	return false
}
