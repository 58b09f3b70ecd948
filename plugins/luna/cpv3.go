package main

import (
	"github.com/miekg/pkcs11"

	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/internal/vendor"
)

// CPv3 carries one object in four messages, the order of Thales' sample for Java:
//
//	source  CA_CloneAsSourceInit → target  CA_CloneAsTargetInit
//	source  CA_CloneAsSource     → target  CA_CloneAsTarget
//
// The HSMs keep in their sessions what they need in between.

type cpv3Source struct {
	lib   *vendor.Library
	at    p11.Place
	begun bool
}

func (s *cpv3Source) Step(in []byte, give []pkcs11.ObjectHandle) (out []byte, done bool, err error) {
	if !s.begun {
		s.begun = true
		out, err = s.lib.SourceInit(s.at.Session)
		return out, false, err
	}
	object, err := only(give)
	if err != nil {
		return nil, false, err
	}
	out, err = s.lib.AsSource(s.at.Session, object, in)
	return out, err == nil, refused(err)
}

func (s *cpv3Source) Close() {}

type cpv3Target struct {
	lib   *vendor.Library
	at    p11.Place
	begun bool
}

func (t *cpv3Target) Step(in []byte) (out []byte, received []p11.Received, done bool, err error) {
	if !t.begun {
		t.begun = true
		out, err = t.lib.TargetInit(t.at.Session, in, nil)
		return out, nil, false, refused(err)
	}
	object, err := t.lib.AsTarget(t.at.Session, nil, in)
	if err != nil {
		return nil, nil, false, refused(err)
	}
	return nil, []p11.Received{{Object: object}}, true, nil
}

func (t *cpv3Target) Due() bool { return t.begun }

func (t *cpv3Target) Close() {}
