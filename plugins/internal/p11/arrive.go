package p11

import (
	"slices"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// What comes to the token is not believed before it is looked at, and what is refused is
// destroyed. Two things must not happen on the way. An HSM that is offered an object that it
// has may answer with that one, and it is not ours to destroy. And a driver may be killed at
// any point: what it leaves must be a whole key, which everybody sees, or nothing secret.

// kept are objects that are not to be destroyed whatever comes of the transfer.
type kept map[pkcs11.ObjectHandle]bool

// keep returns those of what came that were there before.
func keep(there map[pkcs11.ObjectHandle]bool, received []Received) kept {
	had := kept{}
	for _, r := range received {
		if there[r.Object] {
			had[r.Object] = true
		}
	}
	return had
}

// discard destroys what has come and is not to be kept. It returns the first failure.
func (s *session) discard(had kept, received ...Received) (first error) {
	for _, r := range received {
		if r.Err != nil || r.Object == 0 {
			continue
		}
		if had[r.Object] {
			s.d.log.Warn("the HSM answered to a clone with an object that it had before, which is left alone")
			continue
		}
		if err := s.destroyObject(r.Object); err != nil && first == nil {
			first = s.fail("destroying what has come", err)
		}
	}
	return first
}

// listen has the extension take a step, and settles what has become of the keys when it was
// the last.
func (s *session) listen(op string, t *transfer, in []byte) (words []byte, done bool, err error) {
	if err := s.overtaken(op, t); err != nil {
		return nil, false, err
	}
	there, err := s.lookAround(t)
	if err != nil {
		return nil, false, err
	}
	public, err := s.publish(op, t)
	defer func() { s.retract(t, public, err == nil && done) }()
	if err != nil {
		return nil, false, err
	}
	s.job.expect(extensionStep)
	words, received, done, err := t.target.Step(in)
	had := keep(there, received)
	switch {
	case err != nil:
		_ = s.discard(had, received...)
		return nil, false, s.fail(op, err)
	case !done:
		return words, false, nil
	case len(received) != len(t.coming):
		_ = s.discard(had, received...)
		return nil, false, pluginproto.Errorf(pluginproto.ClassMember, op, "%d objects came where %d were asked for", len(received), len(t.coming))
	}
	return nil, true, s.settle(op, t, had, received)
}

// overtaken settles what another transfer has brought since this one wanted it.
func (s *session) overtaken(op string, t *transfer) error {
	for _, i := range t.coming {
		r, id := &t.results[i], t.keys[i]
		if r.Object != nil || r.Err != nil {
			continue
		}
		if _, ok := s.known(id); !ok {
			continue
		}
		var err error
		if *r, _, err = s.weigh(op, id, t.offers[i]); err != nil {
			return err
		}
	}
	return nil
}

// publish puts the public halves of the pairs that come on the token, before they do: half
// of a pair that a killed driver leaves is then never the private one. It returns those that
// it made, by the number of their key. Of what comes the token has to be asked from now on: it
// may come without an answer.
func (s *session) publish(op string, t *transfer) (made map[int]pkcs11.ObjectHandle, err error) {
	if !t.target.Due() {
		return nil, nil
	}
	made = map[int]pkcs11.ObjectHandle{}
	for _, i := range t.coming {
		o := t.offers[i].object
		if r := t.results[i]; r.Object != nil || r.Err != nil {
			continue
		}
		s.job.expect(extensionStep)
		var there halves
		if !o.Type.Symmetric() {
			there, err = s.held(o.ID)
		}
		s.c.index.doubt(o.ID)
		if err != nil {
			return made, err
		}
		if o.Type.Symmetric() || len(there.private)+len(there.public) > 0 {
			continue
		}
		if made[i], err = s.addPublic(op, o); err != nil {
			delete(made, i)
			return made, err
		}
	}
	return made, nil
}

// retract takes back the public halves of pairs that did not come.
func (s *session) retract(t *transfer, made map[int]pkcs11.ObjectHandle, done bool) {
	for i, h := range made {
		if done && t.results[i].Object != nil {
			continue
		}
		there, err := s.objects(t.keys[i])
		s.c.index.doubt(t.keys[i])
		if err == nil && len(there.private) == 0 {
			_ = s.destroyObject(h)
		}
	}
}

// settle finds out what has become of each key.
func (s *session) settle(op string, t *transfer, had kept, received []Received) error {
	for n, i := range t.coming {
		s.job.expect(extensionStep)
		if r := &t.results[i]; r.Object != nil || r.Err != nil {
			s.surplus(t.keys[i], had, received[n])
			continue
		}
		if err := received[n].Err; err != nil {
			t.results[i].Err = s.notReceived(op, err)
			continue
		}
		obj, err := s.accept(op, t.offers[i], had, received[n])
		if err != nil && s.stops(err) {
			_ = s.discard(had, received[n+1:]...)
			return err
		}
		if t.results[i].Err = err; err == nil {
			t.results[i].Object = &obj
			had[received[n].Object] = true
		}
	}
	return nil
}

// surplus destroys an object that has come although it was not wanted, unless it took the
// place of the one that was there.
func (s *session) surplus(id pluginproto.KeyID, had kept, r Received) {
	o, err := s.objects(id)
	s.c.index.doubt(id)
	if err == nil && len(o.secret)+len(o.private) > 1 {
		_ = s.discard(had, r)
	}
}

// accept makes a key of an object that has come: it has to be what the source described.
// What is not accepted is destroyed.
func (s *session) accept(op string, o offered, had kept, r Received) (obj pluginproto.Object, err error) {
	id := o.object.ID
	defer func() {
		if err != nil {
			s.c.index.doubt(id)
			_ = s.discard(had, r)
		}
	}()
	obj = o.object
	if obj.Label, err = s.proveReceived(op, o.object, r.Object); err != nil {
		return obj, err
	}
	there, err := s.objects(id)
	if err != nil {
		return obj, err
	}
	if !there.whole() || !slices.Contains(there.all(), r.Object) {
		return obj, pluginproto.Errorf(pluginproto.ClassCaller, op, "another key was put under the identity %s meanwhile; this one is not kept", id)
	}
	s.c.drop(id)
	if !obj.Type.Symmetric() { // the public half may be one that was there
		if obj, err = s.prove(id, there); err != nil {
			return obj, err
		}
	}
	return obj, s.compareUID(op, o, r.Object)
}
