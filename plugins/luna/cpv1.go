package main

import (
	"errors"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/internal/vendor"
)

// CPv1 carries one object:
//
//	source  CA_GetTokenCertificates → target  CA_GenerateCloningKEV, CA_CloneAsTargetInit
//	source  CA_CloneAsSource        → target  CA_CloneAsTarget
//
// What was read of Thales' page does not say which of the HSM's certificates is meant, nor which
// side makes the key exchange value (KEV): both are inferred. So the source sends all
// certificates that it has and the target takes the first that its HSM takes, with a KEV of its
// own. When either HSM refuses that, it begins once more with a KEV of the source's.
//
// What the source says is an offer, [KEV or nothing, certificate, ...], or the object, [part 2].
// What the target says is [part 1], or nothing when its HSM took no offer.

type cpv1Source struct {
	lib   *vendor.Library
	at    p11.Place
	certs [][]byte
	begun bool
	first error // why the first attempt was refused; nil before that
}

func (s *cpv1Source) Step(in []byte, give []pkcs11.ObjectHandle) (out []byte, done bool, err error) {
	if !s.begun {
		s.begun = true
		if s.certs, err = s.certificates(); err != nil {
			return nil, false, err
		}
		return s.offer(nil), false, nil
	}
	said, err := unpack(in)
	switch {
	case err != nil:
		return nil, false, err
	case len(said) == 0:
		return s.again(pkcs11.Error(pkcs11.CKR_DATA_INVALID))
	case len(said) > 1:
		return nil, false, unreadable()
	}
	object, err := only(give)
	if err != nil {
		return nil, false, err
	}
	part2, err := s.lib.AsSource(s.at.Session, object, said[0])
	if err != nil {
		return s.again(err)
	}
	return pack(part2), true, nil
}

// certificates returns those of the HSM's that may be meant.
func (s *cpv1Source) certificates() (certs [][]byte, err error) {
	for _, kind := range []vendor.Certificate{vendor.TWC3, vendor.TWCECC} {
		cert, one := s.lib.Certificate(s.at.Slot, kind)
		if one == nil {
			certs = append(certs, cert)
		}
		err = errors.Join(err, one)
	}
	if len(certs) == 0 {
		return nil, err
	}
	return certs, nil
}

func (s *cpv1Source) offer(kev []byte) []byte { return pack(append([][]byte{kev}, s.certs...)...) }

// again offers a KEV of ours, when there was none yet and the first attempt was refused.
func (s *cpv1Source) again(why error) (out []byte, done bool, err error) {
	if !isRefusal(why) {
		return nil, false, why
	}
	if s.first == nil {
		s.first = refused(why)
		if kev, err := s.lib.KEV(s.at.Session); err == nil {
			return s.offer(kev), false, nil
		}
	}
	return nil, false, s.first
}

func (s *cpv1Source) Close() {}

type cpv1Target struct {
	lib *vendor.Library
	at  p11.Place
	kev []byte // of the attempt that goes on; nil before
}

func (t *cpv1Target) Step(in []byte) (out []byte, received []p11.Received, done bool, err error) {
	said, err := unpack(in)
	if err != nil {
		return nil, nil, false, err
	}
	if len(said) > 1 {
		out, err = t.take(said[0], said[1:])
		return out, nil, false, err
	}
	if len(said) == 0 || t.kev == nil {
		return nil, nil, false, unreadable()
	}
	object, err := t.lib.AsTarget(t.at.Session, t.kev, said[0])
	if err != nil {
		return nil, nil, false, refused(err)
	}
	return nil, []p11.Received{{Object: object}}, true, nil
}

// take answers an offer: with part 1, or with nothing when the HSM takes none of it with a KEV
// of ours. kev is the source's, empty when ours is to be tried.
func (t *cpv1Target) take(kev []byte, certs [][]byte) ([]byte, error) {
	mine := len(kev) == 0
	var last error
	for _, cert := range certs {
		if mine {
			var err error
			if kev, err = t.lib.KEV(t.at.Session); err != nil {
				return nil, err
			}
		}
		part1, err := t.lib.TargetInit(t.at.Session, cert, kev)
		if err == nil {
			t.kev = kev
			return pack(part1), nil
		}
		if !isRefusal(err) {
			return nil, err
		}
		last = err
	}
	if mine {
		return nil, nil
	}
	return nil, refused(last)
}

// Due implements [p11.Target]. The source may offer once more instead.
func (t *cpv1Target) Due() bool { return t.kev != nil }

func (t *cpv1Target) Close() {}
