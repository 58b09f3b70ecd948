package p11

import (
	"slices"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// proveOffer has the token take a key in, and let it go when it is what was described.
// Whatever the token holds under the identity stays.
func (s *session) proveOffer(op string, t *transfer, in []byte) (out pluginproto.CloneReply, err error) {
	o := t.offers[0]
	if !o.given() {
		return out, pluginproto.Errorf(pluginproto.ClassCaller, op, "the blob holds no key")
	}
	there, err := s.objects(o.object.ID)
	if err != nil {
		return out, err
	}
	t.coming = []int{0}
	if err := s.beginTarget(op, t); err != nil {
		return out, err
	}
	defer t.close(s.c)
	was, err := s.lookAround(t)
	if err != nil {
		return out, err
	}
	public, err := s.publish(op, t)
	defer func() { s.retract(t, public, false) }()
	if err != nil {
		return out, err
	}
	_, received, done, err := t.target.Step(in)
	had := keep(was, received)
	if err == nil && (!done || len(received) != 1) {
		err = pluginproto.Errorf(pluginproto.ClassMember, op, "a blob of %s was to be taken in at once, and was not", t.way.Name)
	}
	if err != nil {
		_ = s.discard(had, received...)
		s.discardSince(o.object.ID, there)
		return out, s.fail(op, err)
	}
	if err := s.proveArrival(op, o.object, there, had, received[0]); err != nil {
		return out, err
	}
	return oneKey(true, nil, o.object), nil
}

// discardSince destroys what has come under an identity since a look at it: an HSM may take
// an object in and fail to say so.
func (s *session) discardSince(id pluginproto.KeyID, was halves) {
	now, err := s.objects(id)
	s.c.index.doubt(id)
	if err != nil {
		return
	}
	for _, h := range append(slices.Clone(now.secret), now.private...) {
		if !slices.Contains(was.all(), h) && !s.replaced(id, was, h) {
			_ = s.destroyObject(h)
		}
	}
}

func (s *session) proveArrival(op string, want pluginproto.Object, there halves, had kept, r Received) error {
	if r.Err != nil {
		err := s.notReceived(op, r.Err)
		if ckr, known := ckrOf(r.Err); known && s.c.codes.meaning(ckr).Exists && there.whole() {
			// The HSM has opened the blob and found an object that it holds; it is this one.
			_, err = s.heldAlready(op, want, there)
		}
		return err
	}
	defer s.c.index.doubt(want.ID)
	_, err := s.proveReceived(op, want, r.Object)
	if s.replaced(want.ID, there, r.Object) {
		return err
	}
	if derr := s.discard(had, r); err == nil {
		err = derr
	}
	return err
}

// replaced reports whether an object that came took the place of one that was there.
func (s *session) replaced(id pluginproto.KeyID, there halves, came pkcs11.ObjectHandle) bool {
	for _, h := range append(slices.Clone(there.secret), there.private...) {
		if h == came || !s.shows(id, h) {
			return true
		}
	}
	return false
}
