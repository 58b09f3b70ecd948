package p11

import (
	"github.com/ThalesIgnite/crypto11"
	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// The templates are as narrow as the commands of a type allow. Every key is
// private and sensitive. It is extractable where that is what lets it be
// wrapped under the domain key and held by more than one token; the session
// copies that commands run on are not, and no key is where an extension clones.

type attr struct {
	typ   uint
	value any
}

// common is what all objects of a key have.
func common(id pluginproto.KeyID, label string, onToken bool) []attr {
	return []attr{
		{pkcs11.CKA_TOKEN, onToken},
		{pkcs11.CKA_ID, id[:]},
		{pkcs11.CKA_LABEL, []byte(label)},
	}
}

// secretAttrs is the template of a secret or private key, for generating and for
// unwrapping alike.
func secretAttrs(t pluginproto.KeyType, extractable bool) []attr {
	aes, rsa := t == pluginproto.AES128 || t == pluginproto.AES256, isRSA(t)
	a := []attr{
		{pkcs11.CKA_PRIVATE, true},
		{pkcs11.CKA_SENSITIVE, true},
		{pkcs11.CKA_EXTRACTABLE, extractable},
		{pkcs11.CKA_DECRYPT, aes || rsa},
		{pkcs11.CKA_SIGN, !aes},
		{pkcs11.CKA_UNWRAP, false},
		{pkcs11.CKA_DERIVE, false},
	}
	if t.Symmetric() {
		a = append(a,
			attr{pkcs11.CKA_ENCRYPT, aes},
			attr{pkcs11.CKA_VERIFY, !aes},
			attr{pkcs11.CKA_WRAP, false})
	}
	return a
}

// publicAttrs is the template of a public half. It is not private: it is shown to
// everybody who asks for it anyway.
func publicAttrs(t pluginproto.KeyType) []attr {
	return []attr{
		{pkcs11.CKA_PRIVATE, false},
		{pkcs11.CKA_VERIFY, true},
		{pkcs11.CKA_ENCRYPT, isRSA(t)},
		{pkcs11.CKA_WRAP, false},
		{pkcs11.CKA_DERIVE, false},
	}
}

func isRSA(t pluginproto.KeyType) bool {
	return t == pluginproto.RSA2048 || t == pluginproto.RSA3072 || t == pluginproto.RSA4096
}

// classAttrs says what kind of object it is. Generating calls do not want it, the
// others do.
func classAttrs(t pluginproto.KeyType, ckk uint) []attr {
	class := uint(pkcs11.CKO_PRIVATE_KEY)
	if t.Symmetric() {
		class = pkcs11.CKO_SECRET_KEY
	}
	return []attr{{pkcs11.CKA_CLASS, class}, {pkcs11.CKA_KEY_TYPE, ckk}}
}

func template(groups ...[]attr) []*pkcs11.Attribute {
	var t []*pkcs11.Attribute
	for _, g := range groups {
		for _, a := range g {
			t = append(t, pkcs11.NewAttribute(a.typ, a.value))
		}
	}
	return t
}

// attributeSet is a template as crypto11 wants it.
func attributeSet(groups ...[]attr) (crypto11.AttributeSet, error) {
	set := crypto11.NewAttributeSet()
	for _, g := range groups {
		for _, a := range g {
			if err := set.Set(crypto11.AttributeType(a.typ), a.value); err != nil {
				return nil, err
			}
		}
	}
	return set, nil
}
