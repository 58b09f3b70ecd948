package p11

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"fmt"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// The functions of this file call into the library: their callers hold the
// driver's lock, through session.read or session.write.

// findChunk is how many handles one C_FindObjects is asked for.
const findChunk = 256

// find returns the objects that match a template. That there are none has to be seen
// twice: a database that is told so makes a new key and loses its data.
func (s *session) find(template ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	all, err := s.findOnce(template...)
	if err == nil && len(all) == 0 {
		all, err = s.findOnce(template...)
	}
	return all, err
}

// findOnce looks at the session afterwards: without a login a library shows private
// objects to nobody and says CKR_OK, and an absence seen that way is not one.
func (s *session) findOnce(template ...*pkcs11.Attribute) (_ []pkcs11.ObjectHandle, err error) {
	const op = "looking for objects"
	s.job.expect(shortStep)
	if err := s.c.lib.FindObjectsInit(s.h, template); err != nil {
		return nil, s.fail(op, err)
	}
	defer func() {
		ferr := s.c.lib.FindObjectsFinal(s.h)
		if err == nil {
			err = s.fail(op, ferr)
		}
		if err == nil {
			err = s.fail(op, s.c.loggedIn(s.h))
		}
	}()
	var all []pkcs11.ObjectHandle
	for {
		some, _, err := s.c.lib.FindObjects(s.h, findChunk)
		if err != nil {
			return nil, s.fail(op, err)
		}
		if len(some) == 0 {
			return all, nil
		}
		all = append(all, some...)
	}
}

// halves are the token objects under one identity.
type halves struct {
	secret, private, public []pkcs11.ObjectHandle
}

// add sorts an object in, false when it is no key.
func (o *halves) add(class uint, h pkcs11.ObjectHandle) bool {
	switch class {
	case pkcs11.CKO_SECRET_KEY:
		o.secret = append(o.secret, h)
	case pkcs11.CKO_PRIVATE_KEY:
		o.private = append(o.private, h)
	case pkcs11.CKO_PUBLIC_KEY:
		o.public = append(o.public, h)
	default:
		return false
	}
	return true
}

// all lists the objects in the order in which they are destroyed: what is secret
// goes first, so that a crash in between leaves nothing that can be used.
func (o *halves) all() []pkcs11.ObjectHandle {
	var all []pkcs11.ObjectHandle
	return append(append(append(all, o.secret...), o.private...), o.public...)
}

// whole reports whether this is exactly one key.
func (o *halves) whole() bool {
	return len(o.secret) == 1 && len(o.private)+len(o.public) == 0 ||
		len(o.secret) == 0 && len(o.private) == 1 && len(o.public) == 1
}

// objects returns what the token holds under an identity, past every cache.
func (s *session) objects(id pluginproto.KeyID) (halves, error) {
	o, err := s.gather(s.find, onToken(id)...)
	if err != nil {
		s.c.index.doubt(id)
		return halves{}, err
	}
	s.c.index.note(id, o)
	return o, nil
}

func onToken(id pluginproto.KeyID) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, id[:])}
}

// gather finds objects, with find or findOnce, and sorts them.
func (s *session) gather(find func(...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error), template ...*pkcs11.Attribute) (halves, error) {
	handles, err := find(template...)
	if err != nil {
		return halves{}, err
	}
	var o halves
	for _, h := range handles {
		values, err := s.attributes(h, pkcs11.CKA_CLASS)
		if err != nil {
			return halves{}, err
		}
		o.add(ulong(values[0]), h)
	}
	return o, nil
}

// key returns what the token holds under an identity, past every cache, provided
// that it is one whole key. Half of a pair, which a crash can leave behind, is no key.
func (s *session) key(id pluginproto.KeyID) (halves, error) {
	op := "looking for the key " + id.String()
	o, err := s.objects(id)
	switch n := len(o.all()); {
	case err != nil:
		return halves{}, err
	case o.whole():
		return o, nil
	case n == 0:
		return halves{}, pluginproto.Errorf(pluginproto.ClassNotFound, op, "it is not on the token")
	case n == 1:
		return halves{}, pluginproto.Errorf(pluginproto.ClassNotFound, op, "only one half of the pair is on the token")
	default:
		return halves{}, pluginproto.Errorf(pluginproto.ClassUnknown, op, "there are %d objects under this identity, none of which is used", n)
	}
}

// described is a whole key as its attributes show it.
type described struct {
	typ   pluginproto.KeyType // "" for a key of a type that is not ours
	label string
	pub   crypto.PublicKey // nil for a secret key
	spki  []byte           // pub as DER
}

func (s *session) describe(o halves) (described, error) {
	if len(o.secret) == 1 {
		return s.describeSecret(o.secret[0])
	}
	return s.describePublic(o.public[0])
}

func (s *session) describeSecret(h pkcs11.ObjectHandle) (described, error) {
	v, err := s.attributes(h, pkcs11.CKA_KEY_TYPE, pkcs11.CKA_LABEL, pkcs11.CKA_VALUE_LEN)
	if ckr, _ := ckrOf(err); ckr == pkcs11.CKR_ATTRIBUTE_TYPE_INVALID { // a DES key has no CKA_VALUE_LEN
		v, err = s.attributes(h, pkcs11.CKA_KEY_TYPE, pkcs11.CKA_LABEL)
	}
	if err != nil {
		return described{}, err
	}
	ckk, label := ulong(v[0]), string(v[1])
	if len(v) < 3 || ckk != pkcs11.CKK_AES && ckk != pkcs11.CKK_GENERIC_SECRET {
		return described{label: label}, nil
	}
	size := ulong(v[2])
	if size == 0 {
		if size, err = s.measure(h); err != nil {
			return described{}, err
		}
	}
	typ, _ := typeOfSecret(ckk, size)
	return described{typ: typ, label: label}, nil
}

// measure finds the length of a secret key in bytes where CKA_VALUE_LEN does not
// tell, which it does not for keys that SoftHSM 2.6.1 has unwrapped: AES-KWP makes
// 8 bytes more than the key has, for lengths that are multiples of 8 (RFC 5649).
// It is 0 for a key that may not be wrapped, which is none of ours.
func (s *session) measure(h pkcs11.ObjectHandle) (uint, error) {
	if s.c.domainKey == 0 {
		return 0, nil // no key leaves the token wrapped
	}
	wrapped, err := s.c.lib.WrapKey(s.h, mechanism(pkcs11.CKM_AES_KEY_WRAP_PAD, nil), s.c.domainKey, h)
	switch ckr, _ := ckrOf(err); {
	case err == nil && len(wrapped) > 8:
		return uint(len(wrapped) - 8), nil
	case err == nil, s.c.codes.meaning(ckr).Class == pluginproto.ClassCaller:
		return 0, nil
	default:
		return 0, s.fail("measuring a key", err)
	}
}

func (s *session) describePublic(h pkcs11.ObjectHandle) (described, error) {
	v, err := s.attributes(h, pkcs11.CKA_KEY_TYPE, pkcs11.CKA_LABEL)
	if err != nil {
		return described{}, err
	}
	d := described{label: string(v[1])}
	var parts [][]byte
	switch ulong(v[0]) {
	case pkcs11.CKK_RSA:
		if parts, err = s.attributes(h, pkcs11.CKA_MODULUS, pkcs11.CKA_PUBLIC_EXPONENT); err != nil {
			return described{}, err
		}
		d.pub, err = publicFromRSA(parts[0], parts[1])
	case pkcs11.CKK_EC:
		if parts, err = s.attributes(h, pkcs11.CKA_EC_PARAMS, pkcs11.CKA_EC_POINT); err != nil {
			return described{}, err
		}
		d.pub, err = publicFromEC(parts[0], parts[1])
	default:
		return d, nil
	}
	if err != nil {
		return described{label: d.label}, nil // not one of ours; the curve or the size says so
	}
	d.typ, _ = typeOfPublic(d.pub)
	if d.spki, err = x509.MarshalPKIXPublicKey(d.pub); err != nil {
		return described{}, fmt.Errorf("writing a public key: %w", err)
	}
	return d, nil
}

// attributes reads the values of some attributes, in order.
func (s *session) attributes(h pkcs11.ObjectHandle, types ...uint) ([][]byte, error) {
	template := make([]*pkcs11.Attribute, len(types))
	for i, t := range types {
		template[i] = pkcs11.NewAttribute(t, nil)
	}
	got, err := s.c.lib.GetAttributeValue(s.h, h, template)
	if err != nil {
		return nil, s.fail("reading the attributes of an object", err)
	}
	if len(got) != len(types) {
		return nil, pluginproto.Errorf(pluginproto.ClassMember, "reading the attributes of an object", "asked for %d, got %d", len(types), len(got))
	}
	values := make([][]byte, len(types))
	for i, a := range got {
		values[i] = a.Value
	}
	return values, nil
}

// ulong reads a CK_ULONG as the library wrote it: in the byte order of this
// machine, which every platform with these libraries has as little endian.
func ulong(b []byte) uint {
	var v uint
	for i := min(len(b), 8) - 1; i >= 0; i-- {
		v = v<<8 | uint(b[i])
	}
	return v
}

// idOf returns a CKA_ID as an identity, false for one that we did not choose.
func idOf(b []byte) (pluginproto.KeyID, bool) {
	var id pluginproto.KeyID
	if len(b) != len(id) || bytes.Equal(b, id[:]) {
		return id, false
	}
	copy(id[:], b)
	return id, true
}
