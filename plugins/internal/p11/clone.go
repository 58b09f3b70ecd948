package p11

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/asn1"
	"math/big"
	"slices"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// wrapProtocol is how keys go from token to token that derive one domain key: AES key
// wrap with padding (RFC 5649), in one step.
const wrapProtocol = "aes-kwp"

func wrapCloning() []pluginproto.CloneProtocol {
	return []pluginproto.CloneProtocol{{Name: wrapProtocol, Gives: true, Takes: true, Alone: true, BySecret: true, Keys: 1}}
}

// CloneStep implements [pluginproto.Driver]. Keys go by the protocols of the extension
// where there is one, else wrapped under the domain key.
func (d *Driver) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	if d.quirks.Extend != nil {
		return d.transferStep(ctx, req)
	}
	return d.wrapStep(ctx, req)
}

// wrapStep takes the one step that wrapped clones have at each end: the source wraps the
// key, the target unwraps it.
func (d *Driver) wrapStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	const cloning = "cloning a key"
	switch {
	case req.End:
		return pluginproto.CloneReply{}, nil
	case req.Protocol != wrapProtocol:
		return pluginproto.CloneReply{}, pluginproto.Errorf(pluginproto.ClassCaller, cloning, "there is no protocol %q here, only %s", req.Protocol, wrapProtocol)
	case len(req.Keys) != 1:
		return pluginproto.CloneReply{}, pluginproto.Errorf(pluginproto.ClassCaller, cloning, "%d keys in one transfer, %s carries one", len(req.Keys), wrapProtocol)
	}
	op := "cloning the key " + req.Keys[0].String()
	if req.Step != 0 {
		return pluginproto.CloneReply{}, pluginproto.Errorf(pluginproto.ClassCaller, op, "there is no step %d, a clone has step 0 at each end", req.Step)
	}
	switch req.Role {
	case pluginproto.CloneSource:
		if len(req.Blob) != 0 {
			return pluginproto.CloneReply{}, pluginproto.Errorf(pluginproto.ClassCaller, op, "the source takes no blob")
		}
		return call(ctx, d, d.rare, func(s *session) (out pluginproto.CloneReply, err error) {
			err = s.read(func() error {
				out, err = s.cloneOut(op, req)
				return err
			})
			return out, err
		})
	case pluginproto.CloneTarget:
		req.Blob = slices.Clone(req.Blob)
		if req.Prove {
			return call(ctx, d, d.rare, func(s *session) (pluginproto.CloneReply, error) { return s.cloneProof(op, req) })
		}
		return call(ctx, d, d.rare, func(s *session) (pluginproto.CloneReply, error) { return s.cloneIn(op, req) })
	default:
		return pluginproto.CloneReply{}, pluginproto.Errorf(pluginproto.ClassCaller, op, "there is no role %d", req.Role)
	}
}

// oneKey is a reply about the one key of a transfer.
func oneKey(done bool, blob []byte, o pluginproto.Object) pluginproto.CloneReply {
	return pluginproto.CloneReply{Blob: blob, Done: done, Keys: []pluginproto.CloneResult{{Object: &o}}}
}

// cloneOut wraps a key.
func (s *session) cloneOut(op string, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	o, err := s.knownKey(req.Keys[0])
	if err != nil {
		return pluginproto.CloneReply{}, err
	}
	obj, ok, err := s.object(req.Keys[0], o)
	if err != nil {
		return pluginproto.CloneReply{}, err
	}
	if !ok {
		return pluginproto.CloneReply{}, pluginproto.Errorf(pluginproto.ClassCaller, op, "it is of a type that is not supported")
	}
	wrapped, err := s.c.lib.WrapKey(s.h, mechanism(pkcs11.CKM_AES_KEY_WRAP_PAD, nil), s.c.domainKey, append(o.secret, o.private...)[0])
	if err != nil {
		return pluginproto.CloneReply{}, s.refusedToWrap(op, err)
	}
	b := blob{transfer: req.Transfer, object: obj, wrapped: wrapped}
	out, err := b.encode(s.d.secrets.domain)
	if err != nil {
		return pluginproto.CloneReply{}, pluginproto.Errorf(pluginproto.ClassCaller, op, "%v", err)
	}
	return oneKey(true, out, obj), nil
}

// refusedToWrap says why a key cannot leave its token, where that is the doing of
// whoever made it.
func (s *session) refusedToWrap(op string, err error) error {
	ckr, _ := ckrOf(err)
	e := &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: ckr, Op: op}
	switch ckr {
	case pkcs11.CKR_KEY_UNEXTRACTABLE:
		e.Msg = "it was made to stay on its token: its attribute CKA_EXTRACTABLE is false, which cannot be changed"
	case pkcs11.CKR_KEY_NOT_WRAPPABLE:
		e.Msg = "the token does not let it out under the domain key: its attribute CKA_WRAP_WITH_TRUSTED is true, perhaps"
	default:
		return s.fail(op, err)
	}
	return e
}

// cloneIn unwraps a key into a session object, proves it there, and only then
// puts it on the token. What an attempt that was cut short left behind is found
// and completed by the next.
func (s *session) cloneIn(op string, req pluginproto.CloneRequest) (out pluginproto.CloneReply, err error) {
	var b *blob
	var made, lacking halves
	err = s.read(func() (err error) {
		if b, err = s.acceptBlob(op, req); err != nil {
			return err
		}
		there, err := s.held(b.object.ID)
		if err != nil {
			return err
		}
		if there.whole() {
			obj, err := s.heldAlready(op, b.object, there)
			out = oneKey(true, nil, obj)
			return err
		}
		if made, err = s.unwrap(op, b); err != nil {
			return err
		}
		if lacking, err = s.lacking(op, b.object, there, made); err != nil {
			_ = s.destroy(made)
		}
		return err
	})
	if err != nil || out.Done {
		return out, err
	}
	err = s.write(func() error {
		defer func() { _ = s.destroy(made) }()
		return s.place(b.object.ID, lacking)
	})
	if err != nil {
		return out, err
	}
	err = s.read(func() error {
		obj, err := s.inspectKnown(b.object.ID)
		if err != nil {
			return err
		}
		if !bytes.Equal(obj.CheckValue, b.object.CheckValue) {
			return pluginproto.Errorf(pluginproto.ClassMember, op, "the key has another check value on the token than in the session")
		}
		out = oneKey(true, nil, obj)
		return nil
	})
	return out, err
}

// cloneProof unwraps a key into a session object, proves it there, and lets it go.
func (s *session) cloneProof(op string, req pluginproto.CloneRequest) (out pluginproto.CloneReply, err error) {
	err = s.read(func() error {
		b, err := s.acceptBlob(op, req)
		if err != nil {
			return err
		}
		made, err := s.unwrap(op, b)
		if err != nil {
			return err
		}
		if err := s.destroy(made); err != nil {
			return err
		}
		out = oneKey(true, nil, b.object)
		return nil
	})
	return out, err
}

// acceptBlob checks that a blob is authentic and is the one that was asked for.
func (s *session) acceptBlob(op string, req pluginproto.CloneRequest) (*blob, error) {
	b, err := decodeBlob(s.d.secrets.domain, req.Blob)
	switch {
	case err != nil:
		return nil, pluginproto.Errorf(pluginproto.ClassCaller, op, "reading the blob: %v", err)
	case b.transfer != req.Transfer:
		return nil, pluginproto.Errorf(pluginproto.ClassCaller, op, "the blob belongs to another transfer")
	case b.object.ID != req.Keys[0]:
		return nil, pluginproto.Errorf(pluginproto.ClassCaller, op, "the blob holds the key %s", b.object.ID)
	}
	return b, nil
}

// heldAlready answers for a whole key that the token holds. One with the same bytes
// makes the clone a success; any other is refused and stays as it is.
func (s *session) heldAlready(op string, want pluginproto.Object, o halves) (pluginproto.Object, error) {
	obj, ok, err := s.object(want.ID, o)
	if err != nil {
		return pluginproto.Object{}, err
	}
	if !ok || obj.Type != want.Type || !bytes.Equal(obj.CheckValue, want.CheckValue) {
		return pluginproto.Object{}, errOther(op)
	}
	if !obj.Type.Symmetric() {
		matches, err := s.provePair(o.private[0], obj.Type, obj.Public)
		if err != nil {
			return pluginproto.Object{}, err
		}
		if !matches {
			return pluginproto.Object{}, errOther(op)
		}
	}
	return obj, nil
}

func errOther(op string) error {
	return pluginproto.Errorf(pluginproto.ClassCaller, op,
		"the token holds another key under this identity; it is not overwritten: find out which one is right and destroy the other")
}

// unwrap makes session objects of a blob and proves that they are the key that
// the source described.
func (s *session) unwrap(op string, b *blob) (made halves, err error) {
	k, err := kindOf(b.object.Type)
	if err != nil {
		return made, err
	}
	defer func() {
		if err != nil {
			_ = s.destroy(made)
			made = halves{}
		}
	}()
	h, err := s.c.lib.UnwrapKey(s.h, mechanism(pkcs11.CKM_AES_KEY_WRAP_PAD, nil), s.c.domainKey, b.wrapped,
		template(classAttrs(b.object.Type, k.ckk), common(b.object.ID, b.object.Label, false), secretAttrs(b.object.Type, true)))
	if err != nil {
		return made, s.fail(op, err)
	}
	if b.object.Type.Symmetric() {
		made.secret = append(made.secret, h)
		return made, s.proveSecret(op, h, b.object)
	}
	made.private = append(made.private, h)
	matches, err := s.provePair(h, b.object.Type, b.object.Public)
	if err != nil {
		return made, err
	}
	if !matches {
		return made, errNotDescribed(op)
	}
	public, err := s.importPublic(op, b.object, k, false)
	if err != nil {
		return made, err
	}
	made.public = append(made.public, public)
	return made, nil
}

func (s *session) proveSecret(op string, h pkcs11.ObjectHandle, want pluginproto.Object) error {
	d, err := s.describeSecret(h)
	if err != nil {
		return err
	}
	check, err := s.checkSecret(h, want.Type)
	if err != nil {
		return err
	}
	if d.typ != want.Type || !bytes.Equal(check, want.CheckValue) {
		return errNotDescribed(op)
	}
	return nil
}

func errNotDescribed(op string) error {
	return pluginproto.Errorf(pluginproto.ClassCaller, op, "the key that came is not the one that the source described")
}

// importPublic makes an object of a public half.
func (s *session) importPublic(op string, obj pluginproto.Object, k kind, onToken bool) (pkcs11.ObjectHandle, error) {
	pub, err := parsePublic(obj.Public, obj.Type)
	if err != nil {
		return 0, pluginproto.Errorf(pluginproto.ClassCaller, op, "%v", err)
	}
	value := []attr{{pkcs11.CKA_CLASS, uint(pkcs11.CKO_PUBLIC_KEY)}, {pkcs11.CKA_KEY_TYPE, k.ckk}}
	switch pub := pub.(type) {
	case *rsa.PublicKey:
		value = append(value,
			attr{pkcs11.CKA_MODULUS, pub.N.Bytes()},
			attr{pkcs11.CKA_PUBLIC_EXPONENT, big.NewInt(int64(pub.E)).Bytes()})
	case *ecdsa.PublicKey:
		raw, err := pub.Bytes()
		if err != nil {
			return 0, pluginproto.Errorf(pluginproto.ClassCaller, op, "writing the point: %v", err)
		}
		point, err := asn1.Marshal(raw)
		if err != nil {
			return 0, pluginproto.Errorf(pluginproto.ClassCaller, op, "writing the point: %v", err)
		}
		value = append(value, attr{pkcs11.CKA_EC_PARAMS, k.oid}, attr{pkcs11.CKA_EC_POINT, point})
	}
	h, err := s.c.lib.CreateObject(s.h, template(value, common(obj.ID, obj.Label, onToken), publicAttrs(obj.Type)))
	return h, s.fail(op, err)
}

// lacking returns what of a key is not on the token yet.
func (s *session) lacking(op string, want pluginproto.Object, there, made halves) (halves, error) {
	secret, public, err := s.lacks(op, want, there)
	out := halves{}
	if secret {
		out.secret, out.private = made.secret, made.private
	}
	if public {
		out.public = made.public
	}
	return out, err
}

// lacks reports what of a key is not on the token yet: what is secret of it, and a pair's
// public half. Half of a pair that is there already, from a clone or a generation that was
// cut short, is completed if it is of the same key, and refused if not.
func (s *session) lacks(op string, want pluginproto.Object, there halves) (secret, public bool, err error) {
	switch n, pair := len(there.all()), !want.Type.Symmetric(); {
	case n == 0:
		return true, pair, nil
	case pair && n == 1 && len(there.public) == 1:
		d, err := s.describePublic(there.public[0])
		if err != nil {
			return false, false, err
		}
		if !bytes.Equal(d.spki, want.Public) {
			return false, false, errOther(op)
		}
		return true, false, nil
	case pair && n == 1 && len(there.private) == 1:
		matches, err := s.provePair(there.private[0], want.Type, want.Public)
		if err != nil {
			return false, false, err
		}
		if !matches {
			return false, false, errOther(op)
		}
		return false, true, nil
	default:
		return false, false, errOther(op)
	}
}
