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

// Generate implements [pluginproto.Driver].
func (d *Driver) Generate(ctx context.Context, spec pluginproto.KeySpec) (pluginproto.Object, error) {
	op := "generating the key " + spec.ID.String()
	if err := checkKeyLabel(op, spec.Label); err != nil {
		return pluginproto.Object{}, err
	}
	if _, err := kindOf(spec.Type); err != nil {
		return pluginproto.Object{}, err
	}
	ours := false // that the identity was free; outlives a lost connection
	return call(ctx, d, d.rare, func(s *session) (out pluginproto.Object, err error) {
		if err := s.claim(op, spec.ID, &ours); err != nil {
			return out, err
		}
		made, err := s.generate(op, spec)
		if err != nil {
			return out, err
		}
		err = s.write(func() error {
			defer func() { _ = s.destroy(made) }()
			return s.place(spec.ID, made)
		})
		if err != nil {
			return out, err
		}
		err = s.read(func() error {
			out, err = s.inspectKnown(spec.ID)
			return err
		})
		return out, err
	})
}

// claim makes sure that nothing is on the token under an identity. What an
// earlier attempt of the same call left there, or in the session, is removed.
func (s *session) claim(op string, id pluginproto.KeyID, ours *bool) error {
	if *ours {
		return s.write(func() error {
			o, err := s.gather(pkcs11.NewAttribute(pkcs11.CKA_ID, id[:]))
			if err != nil {
				return err
			}
			s.c.index.doubt(id)
			return s.destroy(o)
		})
	}
	return s.read(func() error {
		o, err := s.held(id)
		if err != nil {
			return err
		}
		if n := len(o.all()); n > 0 {
			return pluginproto.Errorf(pluginproto.ClassCaller, op, "the identity is taken: %d objects on the token have it", n)
		}
		*ours = true
		s.c.drop(id) // a copy whose key was removed by other means
		return nil
	})
}

// generate makes the key as session objects, which takes from microseconds to
// many seconds and keeps nobody else from the token.
func (s *session) generate(op string, spec pluginproto.KeySpec) (made halves, err error) {
	err = s.read(func() error {
		s.job.expect(makingPair)
		if spec.Type.Symmetric() {
			s.job.expect(makingSecret)
		}
		if spec.Type.Symmetric() {
			made, err = s.generateSecret(spec)
			return s.fail(op, err)
		}
		if err := s.generatePair(spec); err != nil {
			return s.fail(op, err)
		}
		s.job.expect(shortStep)
		made, err = s.gather(pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_ID, spec.ID[:]))
		if err == nil && !made.whole() {
			_ = s.destroy(made)
			err = pluginproto.Errorf(pluginproto.ClassMember, op, "the token made %d objects", len(made.all()))
		}
		return err
	})
	return made, err
}

// generateSecret makes a secret key. crypto11 would keep the handle to itself, and finding
// the key again takes a look at every object of the token.
func (s *session) generateSecret(spec pluginproto.KeySpec) (made halves, err error) {
	k, err := kindOf(spec.Type)
	if err != nil {
		return made, err
	}
	mech := uint(pkcs11.CKM_AES_KEY_GEN)
	if k.ckk == pkcs11.CKK_GENERIC_SECRET {
		mech = pkcs11.CKM_GENERIC_SECRET_KEY_GEN
	}
	h, err := s.c.lib.GenerateKey(s.h, mechanism(mech, nil), template(
		classAttrs(spec.Type, k.ckk), common(spec.ID, spec.Label, false), secretAttrs(spec.Type),
		[]attr{{pkcs11.CKA_VALUE_LEN, k.bits / 8}}))
	if err != nil {
		return made, err
	}
	made.secret = append(made.secret, h)
	return made, nil
}

// generatePair lets crypto11 make a key pair. It keeps the handles to itself, so the
// objects are found by their identity afterwards.
func (s *session) generatePair(spec pluginproto.KeySpec) error {
	k, err := kindOf(spec.Type)
	if err != nil {
		return err
	}
	private, err := attributeSet(common(spec.ID, spec.Label, false), secretAttrs(spec.Type))
	if err != nil {
		return err
	}
	public, err := attributeSet(common(spec.ID, spec.Label, false), publicAttrs(spec.Type))
	if err != nil {
		return err
	}
	if k.ckk == pkcs11.CKK_RSA {
		_, err = s.c.c11.GenerateRSAKeyPairWithAttributes(public, private, k.bits)
	} else {
		_, err = s.c.c11.GenerateECDSAKeyPairWithAttributes(public, private, k.curve)
	}
	return err
}

// place copies session objects to the token, all or none. The public half goes
// first: a crash in between leaves half a pair, which is no key and holds no
// secret. Called under the write lock.
func (s *session) place(id pluginproto.KeyID, made halves) (err error) {
	var placed halves
	s.c.index.doubt(id)
	defer func() {
		if err != nil {
			_ = s.destroy(placed)
		} else if placed.whole() { // else it completes what was there
			s.c.index.note(id, placed)
		}
	}()
	for _, part := range []struct{ from, to *[]pkcs11.ObjectHandle }{
		{&made.public, &placed.public}, {&made.private, &placed.private}, {&made.secret, &placed.secret},
	} {
		for _, h := range *part.from {
			copied, err := s.c.lib.CopyObject(s.h, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true)})
			if err != nil {
				return s.fail("copying a key to the token", err)
			}
			*part.to = append(*part.to, copied)
		}
	}
	return nil
}

// destroy removes objects, what is secret first. It goes on after a failure and
// returns the first.
func (s *session) destroy(o halves) error {
	var first error
	for _, h := range o.all() {
		if err := s.c.lib.DestroyObject(s.h, h); err != nil && first == nil {
			first = s.fail("destroying an object", err)
		}
	}
	return first
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
