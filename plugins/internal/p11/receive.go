package p11

import (
	"bytes"
	"encoding/hex"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// consider is the target's step 0: it looks at what is offered and says what it wants.
func (s *session) consider(op string, req pluginproto.CloneRequest, way pluginproto.CloneProtocol) (out pluginproto.CloneReply, err error) {
	s.c.endTransfer(idOfTransfer(req)) // of an attempt that was cut short
	t := &transfer{way: way, keys: req.Keys, results: make([]pluginproto.CloneResult, len(req.Keys))}
	in, err := openFrame(s.d.secrets.domain, req)
	if err == nil {
		t.offers, in, err = parseOffer(in, req.Keys)
	}
	if err != nil {
		return out, pluginproto.Errorf(pluginproto.ClassCaller, op, "%v", err)
	}
	if req.Prove {
		return s.proveOffer(op, t, in)
	}
	var wanted []int
	for i, o := range t.offers {
		s.job.expect(extensionStep)
		want := false
		t.results[i], want, err = s.weigh(op, req.Keys[i], o)
		switch {
		case err != nil:
			return out, err
		case want:
			wanted = append(wanted, i)
			t.coming = append(t.coming, i)
		case way.Alone && o.given():
			t.coming = append(t.coming, i) // the source was not asked
		}
	}
	if len(wanted) == 0 {
		return t.reply()
	}
	if !way.Alone {
		if err := s.c.makeRoom(op, s.d.leftAlone()); err != nil {
			return out, err
		}
	}
	if err := s.beginTarget(op, t); err != nil {
		return out, err
	}
	return s.hear(op, req, t, in, appendWants(nil, len(req.Keys), wanted))
}

func (s *session) beginTarget(op string, t *transfer) (err error) {
	if t.handle, err = s.c.session(); err != nil {
		return err
	}
	if t.target, err = s.c.ext.Target(t.way.Name, s.c.at(t.handle), len(t.coming)); err != nil {
		t.close(s.c)
	}
	return s.fail(op, err)
}

// takeOn is a later step of the target.
func (s *session) takeOn(op string, req pluginproto.CloneRequest) (out pluginproto.CloneReply, err error) {
	t, err := s.c.takeTransfer(op, req)
	if err != nil {
		return out, err
	}
	in, err := openFrame(s.d.secrets.domain, req)
	if err != nil {
		t.close(s.c)
		return out, pluginproto.Errorf(pluginproto.ClassCaller, op, "%v", err)
	}
	out, err = s.hear(op, req, t, in, nil)
	return out, lostMidway(op, s.c.codes, err)
}

// reply ends a transfer at the target. What is wrong with the only key is the error of the
// call.
func (t *transfer) reply() (pluginproto.CloneReply, error) {
	if len(t.results) == 1 && t.results[0].Err != nil {
		return pluginproto.CloneReply{}, t.results[0].Err
	}
	return pluginproto.CloneReply{Done: true, Keys: t.results}, nil
}

// hear has the target take its step, keeps the transfer for the next one, or looks at what
// has come and closes it.
func (s *session) hear(op string, req pluginproto.CloneRequest, t *transfer, in, head []byte) (out pluginproto.CloneReply, err error) {
	words, done, err := s.listen(op, t, in)
	if err == nil && !done {
		if out.Blob, err = s.say(op, req, append(head, words...)); err == nil {
			s.c.keepTransfer(idOfTransfer(req), t)
			return out, nil
		}
	}
	t.close(s.c)
	if err != nil {
		return pluginproto.CloneReply{}, err
	}
	return t.reply()
}

// weigh finds out whether the token wants a key that is offered. It settles all that can be
// settled without its coming.
func (s *session) weigh(op string, id pluginproto.KeyID, o offered) (out pluginproto.CloneResult, want bool, err error) {
	if !o.given() {
		out.Err = pluginproto.Errorf(pluginproto.ClassCaller, op, "the source does not give the key %s", id)
		return out, false, nil
	}
	there, err := s.held(id)
	if err != nil {
		return out, false, err
	}
	var obj pluginproto.Object
	if there.whole() {
		obj, err = s.heldAlready(op, o.object, there)
	} else {
		obj, want, err = s.complete(op, o, there)
	}
	if err != nil && s.stops(err) {
		return out, false, err
	}
	if out.Err = err; err == nil && !want {
		out.Object = &obj
	}
	return out, err == nil && want, nil
}

// complete makes a whole pair of a private half, when that is what an earlier attempt has
// left. Else it reports whether the key is wanted.
func (s *session) complete(op string, o offered, there halves) (obj pluginproto.Object, want bool, err error) {
	secret, public, err := s.lacks(op, o.object, there)
	if err != nil {
		return obj, false, err
	}
	if secret {
		return obj, true, s.notElsewhere(op, o)
	}
	if public {
		if _, err := s.addPublic(op, o.object); err != nil {
			return obj, false, err
		}
	}
	obj, err = s.inspect(o.object.ID)
	return obj, false, err
}

// addPublic puts a public half on the token.
func (s *session) addPublic(op string, o pluginproto.Object) (pkcs11.ObjectHandle, error) {
	k, err := kindOf(o.Type)
	if err != nil {
		return 0, err
	}
	return s.importPublic(op, o, k, true)
}

// notElsewhere refuses a key that the token has under another identity.
func (s *session) notElsewhere(op string, o offered) error {
	if len(o.uid) == 0 {
		return nil
	}
	h, found, err := s.c.ext.ByUID(s.c.at(s.h), o.uid)
	if err != nil || !found {
		return s.fail(op, err)
	}
	v, err := s.attributes(h, pkcs11.CKA_ID)
	if err != nil {
		return nil // one that this session does not see is in nobody's way; trouble shows in the next call
	}
	if bytes.Equal(v[0], o.object.ID[:]) {
		return nil // what a library does with one that it has already is the extension's to say
	}
	return pluginproto.Errorf(pluginproto.ClassCaller, op,
		"the token has this very object already, with the CKA_ID %x: somebody changed it; give it back the identity %s, or destroy it", v[0], o.object.ID)
}

// notReceived says why an object did not come.
func (s *session) notReceived(op string, err error) error {
	err = s.fail(op, err)
	if ckr, known := ckrOf(err); known && s.c.codes.meaning(ckr).Exists {
		return &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: ckr, Op: op,
			Msg: "the token has this very object already, and not as a key of this identity; find it by its label or type, and destroy it or give it back its CKA_ID"}
	}
	return err
}

// proveReceived makes sure that an object is the one that the source described, and that it
// can never leave the token but by cloning. It returns the object's label.
func (s *session) proveReceived(op string, want pluginproto.Object, h pkcs11.ObjectHandle) (label string, err error) {
	v, err := s.attributes(h, pkcs11.CKA_CLASS, pkcs11.CKA_ID, pkcs11.CKA_TOKEN, pkcs11.CKA_PRIVATE, pkcs11.CKA_SENSITIVE,
		pkcs11.CKA_EXTRACTABLE, pkcs11.CKA_LABEL)
	if err != nil {
		return "", err
	}
	class := uint(pkcs11.CKO_PRIVATE_KEY)
	if want.Type.Symmetric() {
		class = pkcs11.CKO_SECRET_KEY
	}
	if ulong(v[0]) != class || !bytes.Equal(v[1], want.ID[:]) {
		return "", errNotDescribed(op)
	}
	if ulong(v[2]) == 0 || ulong(v[3]) == 0 || ulong(v[4]) == 0 || ulong(v[5]) != 0 {
		return "", pluginproto.Errorf(pluginproto.ClassCaller, op, "the object that came is not one that stays on the token, private and sensitive, for good")
	}
	if want.Type.Symmetric() {
		return string(v[6]), s.proveSecret(op, h, want)
	}
	matches, err := s.provePair(h, want.Type, want.Public)
	if err == nil && !matches {
		err = errNotDescribed(op)
	}
	return string(v[6]), err
}

// compareUID looks whether the object has kept its name. One that has another is as good a
// key, its check value says so, and somebody may want to know.
func (s *session) compareUID(op string, o offered, h pkcs11.ObjectHandle) error {
	uid, err := s.c.ext.UID(s.c.at(s.h), h)
	if err != nil {
		return s.fail(op, err)
	}
	if len(uid) > 0 && len(o.uid) > 0 && !bytes.Equal(uid, o.uid) {
		s.d.log.Warn("a cloned object has another UID than at its source", "key", o.object.ID.String(), "there", hex.EncodeToString(o.uid), "here", hex.EncodeToString(uid))
	}
	return nil
}
