package p11

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// Keys that can never be extracted go from HSM to HSM by the HSMs' own protocols. The
// extension speaks those; what is here describes the keys, binds every word to its place
// (frame.go), keeps each transfer in a session of its own (transfertable.go) and believes
// nothing of what has come before the token shows it (receive.go).

// extensionStep is how long an extension's step may take before probes wait for it: an HSM
// takes its time over fifty objects.
const extensionStep = 15 * time.Second

// transferStep takes a step of a transfer by one of the extension's protocols.
func (d *Driver) transferStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	op := "cloning the keys of a transfer"
	if len(req.Keys) == 1 {
		op = "cloning the key " + req.Keys[0].String()
	}
	req.Keys, req.Blob = slices.Clone(req.Keys), slices.Clone(req.Blob)
	return call(ctx, d, d.rare, func(s *session) (out pluginproto.CloneReply, err error) {
		lend := s.read
		if req.Role == pluginproto.CloneTarget && !d.quirks.OnToken {
			lend = s.write // keys are put on the token
		}
		err = lend(func() error {
			out, err = s.transferStep(op, req)
			return err
		})
		return out, err
	})
}

func (s *session) transferStep(op string, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	if req.End {
		s.c.endTransfer(idOfTransfer(req))
		return pluginproto.CloneReply{}, nil
	}
	way, err := s.c.way(op, req)
	if err != nil {
		return pluginproto.CloneReply{}, err
	}
	s.job.expect(extensionStep)
	switch {
	case req.Role == pluginproto.CloneSource && req.Step == 0:
		return s.offer(op, req, way)
	case req.Role == pluginproto.CloneSource:
		return s.give(op, req)
	case req.Step == 0:
		return s.consider(op, req, way)
	default:
		return s.takeOn(op, req)
	}
}

// way returns the protocol of a request that can be served by it.
func (c *conn) way(op string, req pluginproto.CloneRequest) (way pluginproto.CloneProtocol, err error) {
	refuse := func(format string, args ...any) (pluginproto.CloneProtocol, error) {
		return way, pluginproto.Errorf(pluginproto.ClassCaller, op, format, args...)
	}
	at := slices.IndexFunc(c.info.Cloning, func(p pluginproto.CloneProtocol) bool { return p.Name == req.Protocol })
	if at < 0 {
		return refuse("there is no protocol %q here, only: %s", req.Protocol, protocolNames(c.info.Cloning))
	}
	way = c.info.Cloning[at]
	switch source := req.Role == pluginproto.CloneSource; {
	case !source && req.Role != pluginproto.CloneTarget:
		return refuse("there is no role %d", req.Role)
	case source && !way.Gives:
		return refuse("keys cannot leave this token by %s", way.Name)
	case !source && !way.Takes:
		return refuse("keys cannot come to this token by %s", way.Name)
	case len(req.Keys) < 1 || len(req.Keys) > max(way.Keys, 1):
		return refuse("%d keys in one transfer, %s carries %d", len(req.Keys), way.Name, max(way.Keys, 1))
	case req.Prove && (source || req.Step != 0 || len(req.Keys) != 1 || !way.Alone):
		return refuse("%s cannot prove a blob so: a target does, with one key, in its first step, by a protocol whose blobs stand alone", way.Name)
	}
	return way, nil
}

// offer is the source's step 0: it describes the keys.
func (s *session) offer(op string, req pluginproto.CloneRequest, way pluginproto.CloneProtocol) (out pluginproto.CloneReply, err error) {
	if len(req.Blob) != 0 {
		return out, pluginproto.Errorf(pluginproto.ClassCaller, op, "the source takes no blob")
	}
	s.c.endTransfer(idOfTransfer(req)) // of an attempt that was cut short
	if !way.Alone {
		if err := s.c.makeRoom(op, s.d.leftAlone()); err != nil {
			return out, err
		}
	}
	t := &transfer{way: way, keys: req.Keys, objects: make([]pkcs11.ObjectHandle, len(req.Keys))}
	offers := make([]offered, len(req.Keys))
	out.Keys = make([]pluginproto.CloneResult, len(req.Keys))
	for i, id := range req.Keys {
		s.job.expect(extensionStep)
		offers[i], t.objects[i], err = s.describeOffer(op, id)
		if err != nil && (len(req.Keys) == 1 || s.stops(err)) {
			return out, err
		}
		if err != nil {
			out.Keys[i].Err = err
			continue
		}
		out.Keys[i].Object = &offers[i].object
	}
	head, err := appendOffer(nil, req.Keys, offers)
	if err != nil {
		return out, pluginproto.Errorf(pluginproto.ClassCaller, op, "%v", err)
	}
	given := slices.DeleteFunc(slices.Clone(t.objects), func(h pkcs11.ObjectHandle) bool { return h == 0 })
	if len(given) == 0 { // the target learns that, too
		out.Done = way.Alone
		out.Blob, err = s.say(op, req, head)
		return out, err
	}
	if way.Alone {
		t.give = given
	}
	if t.handle, err = s.c.session(); err != nil {
		return out, err
	}
	if t.source, err = s.c.ext.Source(way.Name, s.c.at(t.handle), len(given)); err != nil {
		t.close(s.c)
		return out, s.fail(op, err)
	}
	out.Blob, out.Done, err = s.speak(op, req, t, nil, head)
	return out, err
}

// describeOffer reads a key that is to be given.
func (s *session) describeOffer(op string, id pluginproto.KeyID) (offered, pkcs11.ObjectHandle, error) {
	o, err := s.knownKey(id)
	if err != nil {
		return offered{}, 0, err
	}
	obj, ok, err := s.object(id, o)
	if err != nil {
		return offered{}, 0, err
	}
	if !ok {
		return offered{}, 0, pluginproto.Errorf(pluginproto.ClassCaller, op, "the key %s is of a type that is not supported", id)
	}
	h := append(o.secret, o.private...)[0]
	uid, err := s.c.ext.UID(s.c.at(s.h), h)
	if err != nil {
		return offered{}, 0, s.fail(op, err)
	}
	given := offered{object: obj, uid: uid}
	if _, err := appendOffer(nil, []pluginproto.KeyID{id}, []offered{given}); err != nil {
		return offered{}, 0, pluginproto.Errorf(pluginproto.ClassCaller, op, "describing the key %s: %v", id, err)
	}
	return given, h, nil
}

// stops reports whether a failure is not one key's, so that the others would fail as well.
func (s *session) stops(err error) bool {
	class := pluginproto.ClassOf(err)
	return class == pluginproto.ClassMember || class == pluginproto.ClassBusy || s.c.codes.isGone(err)
}

// give is a later step of the source.
func (s *session) give(op string, req pluginproto.CloneRequest) (out pluginproto.CloneReply, err error) {
	t, err := s.c.takeTransfer(op, req)
	if err != nil {
		return out, err
	}
	in, err := openFrame(s.d.secrets.domain, req)
	if err == nil && req.Step == 1 {
		in, err = t.choose(in)
	}
	if err != nil {
		t.close(s.c)
		return out, pluginproto.Errorf(pluginproto.ClassCaller, op, "%v", err)
	}
	out.Blob, out.Done, err = s.speak(op, req, t, in, nil)
	return out, lostMidway(op, s.c.codes, err)
}

// choose takes down what the target wants.
func (t *transfer) choose(in []byte) (rest []byte, err error) {
	wanted, rest, err := parseWants(in, len(t.keys))
	if err != nil {
		return nil, err
	}
	for _, i := range wanted {
		if t.objects[i] == 0 {
			return nil, fmt.Errorf("the target wants the key %s, which was not offered", t.keys[i])
		}
		t.give = append(t.give, t.objects[i])
	}
	if len(t.give) == 0 {
		return nil, fmt.Errorf("the target wants none of the keys")
	}
	return rest, nil
}

// speak has the source take its step, and keeps the transfer for the next or closes it.
func (s *session) speak(op string, req pluginproto.CloneRequest, t *transfer, in, head []byte) (blob []byte, done bool, err error) {
	defer func() {
		if err != nil || done {
			t.close(s.c)
		} else {
			s.c.keepTransfer(idOfTransfer(req), t)
		}
	}()
	s.job.expect(extensionStep)
	words, done, err := t.source.Step(in, t.give)
	if err != nil {
		return nil, false, s.fail(op, err)
	}
	if req.Step == 0 && done != t.way.Alone {
		return nil, false, pluginproto.Errorf(pluginproto.ClassMember, op, "the source is done: %v, and whether blobs of %s stand alone: %v", done, t.way.Name, t.way.Alone)
	}
	blob, err = s.say(op, req, append(head, words...))
	return blob, done, err
}

// say binds a payload to the step that it is the answer to.
func (s *session) say(op string, req pluginproto.CloneRequest, payload []byte) ([]byte, error) {
	f := frame{role: req.Role, step: req.Step, transfer: req.Transfer, protocol: req.Protocol, payload: payload}
	out, err := f.encode(s.d.secrets.domain)
	if err != nil {
		return nil, pluginproto.Errorf(pluginproto.ClassCaller, op, "%v", err)
	}
	return out, nil
}

// lostMidway says what it means for a transfer that its session is gone, or a handle: it
// cannot go on, and what the next call does about the connection is none of its business.
func lostMidway(op string, codes Codes, err error) error {
	if err == nil || !codes.isGone(err) {
		return err
	}
	return pluginproto.Errorf(pluginproto.ClassUnknown, op, "the transfer is lost, begin another: %v", err)
}
