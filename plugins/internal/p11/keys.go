package p11

import (
	"context"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

func checkKeyLabel(op, label string) error {
	if len(label) > pluginproto.MaxLabel {
		return pluginproto.Errorf(pluginproto.ClassCaller, op, "the label has %d bytes, at most %d are taken", len(label), pluginproto.MaxLabel)
	}
	return nil
}

// List implements [pluginproto.Driver]. Objects of other applications, keys of
// other types or without a check value and halves of pairs are left out; none of
// them stops the listing.
func (d *Driver) List(ctx context.Context) ([]pluginproto.Object, error) {
	return call(ctx, d, d.rare, func(s *session) (out []pluginproto.Object, err error) {
		err = s.read(func() error {
			out, err = s.list()
			return err
		})
		return out, err
	})
}

func (s *session) list() ([]pluginproto.Object, error) {
	byID, err := s.survey()
	if err != nil {
		return nil, err
	}
	out := make([]pluginproto.Object, 0, len(byID))
	for id, o := range byID {
		s.job.expect(shortStep)
		if !o.whole() {
			s.d.log.Warn("objects on the token are left out: they are not one whole key", "key", id.String(), "objects", len(o.all()))
			continue
		}
		obj, ok, err := s.object(id, o)
		if ckr, _ := ckrOf(err); ckr == pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED {
			s.d.log.Warn("a key on the token is left out: its attributes do not let it encrypt, or sign, so it has no check value", "key", id.String())
			continue
		}
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, obj)
		}
	}
	return out, nil
}

// object reads a whole key, false when it is of a type that is not ours.
func (s *session) object(id pluginproto.KeyID, o halves) (pluginproto.Object, bool, error) {
	d, err := s.describe(o)
	if err != nil || d.typ == "" {
		return pluginproto.Object{}, false, err
	}
	check, err := s.checkValue(o, d)
	if err != nil {
		return pluginproto.Object{}, false, err
	}
	return pluginproto.Object{ID: id, Type: d.typ, Label: d.label, CheckValue: check, Public: d.spki}, true, nil
}

// Inspect implements [pluginproto.Driver]. For a pair it also makes the private
// half sign something that the public half verifies.
func (d *Driver) Inspect(ctx context.Context, id pluginproto.KeyID) (pluginproto.Object, error) {
	return call(ctx, d, d.rare, func(s *session) (out pluginproto.Object, err error) {
		err = s.read(func() error {
			out, err = s.inspect(id)
			return err
		})
		return out, err
	})
}

// inspect looks for a key past every cache.
func (s *session) inspect(id pluginproto.KeyID) (pluginproto.Object, error) {
	o, err := s.key(id)
	if err != nil {
		return pluginproto.Object{}, err
	}
	return s.prove(id, o)
}

// inspectKnown is inspect for a key that was put on the token a moment ago.
func (s *session) inspectKnown(id pluginproto.KeyID) (pluginproto.Object, error) {
	o, err := s.knownKey(id)
	if err != nil {
		return pluginproto.Object{}, err
	}
	return s.prove(id, o)
}

// prove reads a key and makes sure that its halves belong together.
func (s *session) prove(id pluginproto.KeyID, o halves) (pluginproto.Object, error) {
	obj, ok, err := s.object(id, o)
	switch {
	case err != nil:
		return pluginproto.Object{}, err
	case !ok:
		return pluginproto.Object{}, pluginproto.Errorf(pluginproto.ClassCaller, "reading the key "+id.String(), "it is of a type that is not supported")
	case obj.Type.Symmetric():
		return obj, nil
	}
	matches, err := s.provePair(o.private[0], obj.Type, obj.Public)
	if err != nil {
		return pluginproto.Object{}, err
	}
	if !matches {
		return pluginproto.Object{}, pluginproto.Errorf(pluginproto.ClassMember, "reading the key "+id.String(), "the private half does not belong to the public half")
	}
	return obj, nil
}

// destroy removes objects, what is secret first. It goes on after a failure and
// returns the first.
func (s *session) destroy(o halves) error {
	var first error
	for _, h := range o.all() {
		if err := s.destroyObject(h); err != nil && first == nil {
			first = s.fail("destroying an object", err)
		}
	}
	return first
}

func (s *session) destroyObject(h pkcs11.ObjectHandle) error {
	err := s.c.lib.DestroyObject(s.h, h)
	if err == nil {
		s.c.index.destroyed(h)
	}
	return err
}

// SetAttributes implements [pluginproto.Driver].
func (d *Driver) SetAttributes(ctx context.Context, id pluginproto.KeyID, attrs pluginproto.Attributes) error {
	op := "changing the key " + id.String()
	var label *string
	if attrs.Label != nil {
		copied := *attrs.Label
		label = &copied
		if err := checkKeyLabel(op, copied); err != nil {
			return err
		}
	}
	_, err := call(ctx, d, d.rare, func(s *session) (struct{}, error) {
		var o halves
		err := s.read(func() (err error) {
			o, err = s.knownKey(id)
			return err
		})
		if err != nil || label == nil {
			return struct{}{}, err
		}
		return struct{}{}, s.write(func() error {
			set := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, []byte(*label))}
			for _, h := range o.all() {
				if err := s.c.lib.SetAttributeValue(s.h, h, set); err != nil {
					return s.fail(op, err)
				}
			}
			return nil
		})
	})
	return err
}

// Destroy implements [pluginproto.Driver]. It also removes what is left of a key
// whose making or destroying was cut short. Looking for objects takes long where the
// token has many, and is done without keeping commands waiting.
func (d *Driver) Destroy(ctx context.Context, id pluginproto.KeyID) error {
	op := "destroying the key " + id.String()
	begun := false // that an attempt found it; outlives a lost connection
	_, err := call(ctx, d, d.rare, func(s *session) (struct{}, error) {
		var o halves
		err := s.read(func() (err error) {
			o, err = s.objects(id)
			return err
		})
		if err != nil {
			return struct{}{}, err
		}
		err = s.write(func() error {
			s.c.drop(id)
			if len(o.all()) == 0 && !begun {
				return pluginproto.Errorf(pluginproto.ClassNotFound, op, "it is not on the token")
			}
			begun = true
			s.c.index.doubt(id)
			return s.destroy(o)
		})
		if err != nil {
			return struct{}{}, err
		}
		return struct{}{}, s.read(func() error {
			left, err := s.objects(id)
			if err != nil {
				return err
			}
			if n := len(left.all()); n > 0 {
				return pluginproto.Errorf(pluginproto.ClassMember, op, "%d objects are still on the token", n)
			}
			return nil
		})
	})
	return err
}
