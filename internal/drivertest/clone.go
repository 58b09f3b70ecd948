package drivertest

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"

	"kmsd/pluginproto"
)

// ways returns all the protocols by which two tokens exchange keys, the best first.
func ways(t *testing.T, a, b pluginproto.TokenInfo) []pluginproto.CloneProtocol {
	t.Helper()
	var all []pluginproto.CloneProtocol
	for _, p := range a.Cloning {
		if way, ok := pluginproto.CommonProtocol([]pluginproto.CloneProtocol{p}, b.Cloning); ok {
			if _, back := pluginproto.CommonProtocol(b.Cloning, []pluginproto.CloneProtocol{p}); !back {
				t.Errorf("%s goes one way only", p.Name)
			}
			all = append(all, way)
		}
	}
	if len(all) == 0 {
		t.Fatalf("two tokens of one kind have no clone protocol in common: %+v and %+v", a.Cloning, b.Cloning)
	}
	return all
}

// testClones has keys cloned by one protocol, in every way that is right and many that
// are not.
func (s *suite) testClones(t *testing.T) {
	for _, typ := range s.cfg.Types {
		t.Run("clone, "+string(typ), func(t *testing.T) { s.testClone(t, typ) })
		t.Run("proof of a clone, "+string(typ), func(t *testing.T) { s.testProof(t, typ) })
	}
	t.Run("many keys in one transfer", s.testCloneMany)
	t.Run("a transfer that is left alone", s.testAbandonedClone)
	if slices.Contains(s.cfg.Types, pluginproto.AES256) {
		t.Run("altered clones", s.testAlteredClones)
	}
}

// request is a step of a transfer.
func (s *suite) request(transfer [16]byte, role pluginproto.CloneRole, ids ...pluginproto.KeyID) pluginproto.CloneRequest {
	return pluginproto.CloneRequest{Transfer: transfer, Role: role, Protocol: s.way.Name, Keys: ids}
}

// alteration changes a blob on its way. It learns which end gave it, and at which step.
type alteration func(giver pluginproto.CloneRole, step int, blob []byte) []byte

// relayAll copies keys from one driver to another as the core does. Each blob passes
// through alter; nil leaves them as they are.
func (s *suite) relayAll(t *testing.T, from, to pluginproto.Driver, transfer [16]byte, ids []pluginproto.KeyID, alter alteration) ([]pluginproto.CloneResult, error) {
	t.Helper()
	source, target := s.request(transfer, pluginproto.CloneSource, ids...), s.request(transfer, pluginproto.CloneTarget, ids...)
	defer s.end(t, from, source)
	defer s.end(t, to, target)
	for step := range 16 {
		source.Step, target.Step = step, step
		given, err := from.CloneStep(limit(t), source)
		if err != nil {
			return nil, fmt.Errorf("source step %d: %w", step, err)
		}
		if step == 0 {
			if err := s.shows(given, ids); err != nil {
				return nil, err
			}
		}
		if alter != nil {
			given.Blob = alter(pluginproto.CloneSource, step, given.Blob)
		}
		target.Blob = given.Blob
		taken, err := to.CloneStep(limit(t), target)
		if err != nil {
			return nil, fmt.Errorf("target step %d: %w", step, err)
		}
		if taken.Done {
			if len(taken.Keys) != len(ids) {
				return nil, fmt.Errorf("the target is done and answers for %d keys of %d", len(taken.Keys), len(ids))
			}
			return taken.Keys, nil
		}
		source.Blob = taken.Blob
		if alter != nil {
			source.Blob = alter(pluginproto.CloneTarget, step, source.Blob)
		}
	}
	return nil, errors.New("the clone does not end")
}

// end ends a transfer, which never fails on a driver that works.
func (s *suite) end(t *testing.T, d pluginproto.Driver, req pluginproto.CloneRequest) {
	t.Helper()
	req.Step, req.Blob, req.End = 0, nil, true
	for range 2 { // nothing happens to one that is over already
		if _, err := d.CloneStep(limit(t), req); err != nil {
			t.Errorf("ending a transfer: %v", err)
		}
	}
}

// shows wants a source to show what it gives.
func (s *suite) shows(given pluginproto.CloneReply, ids []pluginproto.KeyID) error {
	if given.Done != s.way.Alone {
		return fmt.Errorf("the source is done: %v; its blobs stand alone: %v", given.Done, s.way.Alone)
	}
	if len(given.Keys) != len(ids) {
		return fmt.Errorf("the source shows %d keys of %d", len(given.Keys), len(ids))
	}
	for i, k := range given.Keys {
		if k.Err == nil && (k.Object == nil || k.Object.ID != ids[i] || len(k.Object.CheckValue) == 0) {
			return errors.New("the source does not show the object that it gives")
		}
	}
	return nil
}

// relay copies one key.
func (s *suite) relay(t *testing.T, from, to pluginproto.Driver, id pluginproto.KeyID, alter alteration) (pluginproto.Object, error) {
	t.Helper()
	results, err := s.relayAll(t, from, to, newID(), []pluginproto.KeyID{id}, alter)
	switch {
	case err != nil:
		return pluginproto.Object{}, err
	case results[0].Object == nil:
		return pluginproto.Object{}, errors.New("the target is done and shows no object")
	}
	return *results[0].Object, nil
}

// testClone copies a key and uses the copy.
func (s *suite) testClone(t *testing.T, typ pluginproto.KeyType) {
	made := s.made[typ]
	copied, err := s.relay(t, s.a, s.b, made.ID, nil)
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

	again, err := s.relay(t, s.a, s.b, made.ID, nil)
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

// cloneBack shows that a copy is as good a source as the key, and puts the key back.
func (s *suite) cloneBack(t *testing.T, made pluginproto.Object) {
	if err := s.a.Destroy(limit(t), made.ID); err != nil {
		t.Fatalf("destroying the key: %v", err)
	}
	back, err := s.relay(t, s.b, s.a, made.ID, nil)
	if err != nil {
		t.Fatalf("cloning the copy back: %v", err)
	}
	sameObject(t, "the copy of the copy", back, made)
}
