package p11

import (
	"context"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

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
		if d.quirks.OnToken {
			err = s.generateThere(op, spec)
		} else {
			err = s.generateAndPlace(op, spec)
		}
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
			o, err := s.gather(s.find, pkcs11.NewAttribute(pkcs11.CKA_ID, id[:]))
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

// generateAndPlace makes the key in the session and copies it to the token.
func (s *session) generateAndPlace(op string, spec pluginproto.KeySpec) error {
	made, err := s.generate(op, spec)
	if err != nil {
		return err
	}
	return s.write(func() error {
		defer func() { _ = s.destroy(made) }()
		return s.place(spec.ID, made)
	})
}

// generateThere makes the key on the token at once. A call that fails may have made it all
// the same, or half of it, so what is there is removed.
func (s *session) generateThere(op string, spec pluginproto.KeySpec) error {
	return s.read(func() (err error) {
		s.c.index.doubt(spec.ID)
		defer func() {
			if err != nil {
				if left, err := s.objects(spec.ID); err == nil {
					_ = s.destroy(left)
				}
				s.c.index.doubt(spec.ID)
			}
		}()
		var made halves
		if spec.Type.Symmetric() {
			s.job.expect(makingSecret)
			made, err = s.generateSecret(spec, true)
		} else {
			s.job.expect(makingPair)
			made, err = s.generatePairThere(spec)
		}
		if err == nil {
			s.c.index.note(spec.ID, made)
		}
		return s.fail(op, err)
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
			made, err = s.generateSecret(spec, false)
			return s.fail(op, err)
		}
		if err := s.generatePair(spec); err != nil {
			return s.fail(op, err)
		}
		s.job.expect(shortStep)
		made, err = s.gather(s.find, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_ID, spec.ID[:]))
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
func (s *session) generateSecret(spec pluginproto.KeySpec, onToken bool) (made halves, err error) {
	k, err := kindOf(spec.Type)
	if err != nil {
		return made, err
	}
	mech := uint(pkcs11.CKM_AES_KEY_GEN)
	if k.ckk == pkcs11.CKK_GENERIC_SECRET {
		mech = pkcs11.CKM_GENERIC_SECRET_KEY_GEN
	}
	h, err := s.c.lib.GenerateKey(s.h, mechanism(mech, nil), template(
		classAttrs(spec.Type, k.ckk), common(spec.ID, spec.Label, onToken), secretAttrs(spec.Type, s.c.extractable()),
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
	private, err := attributeSet(common(spec.ID, spec.Label, false), secretAttrs(spec.Type, s.c.extractable()))
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

// generatePairThere makes a key pair on the token, in one call that tells both handles.
func (s *session) generatePairThere(spec pluginproto.KeySpec) (made halves, err error) {
	k, err := kindOf(spec.Type)
	if err != nil {
		return made, err
	}
	mech, size := uint(pkcs11.CKM_EC_KEY_PAIR_GEN), []attr{{pkcs11.CKA_EC_PARAMS, k.oid}}
	if k.ckk == pkcs11.CKK_RSA {
		mech = pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN
		size = []attr{{pkcs11.CKA_MODULUS_BITS, k.bits}, {pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}}}
	}
	public, private, err := s.c.lib.GenerateKeyPair(s.h, mechanism(mech, nil),
		template(common(spec.ID, spec.Label, true), publicAttrs(spec.Type), size),
		template(common(spec.ID, spec.Label, true), secretAttrs(spec.Type, s.c.extractable())))
	if err != nil {
		return made, err
	}
	return halves{private: []pkcs11.ObjectHandle{private}, public: []pkcs11.ObjectHandle{public}}, nil
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
