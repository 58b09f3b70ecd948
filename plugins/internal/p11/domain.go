package p11

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"fmt"

	"github.com/miekg/pkcs11"
)

// Everything that the members of a group share is derived from the domain secret
// with HKDF-SHA256 (RFC 5869), no salt, under one label each. The labels are part
// of the clone format: changing one parts old members from new ones.
const (
	domainWrapLabel  = "kmsd domain wrap v1"
	domainMACLabel   = "kmsd domain mac v1"
	domainCheckLabel = "kmsd domain check v1"

	minDomainSecret = 32 // bytes
)

// domain holds the keys that every token of a group derives alike.
type domain struct {
	kek   []byte // AES-256, wraps keys for a clone; imported into the token at each connection
	mac   []byte // HMAC-SHA256 over clone blobs; stays in the process
	check []byte // 8 bytes that tell one domain from another and nothing more
}

func newDomain(secret []byte) (*domain, error) {
	if len(secret) < minDomainSecret {
		return nil, permanent("deriving the domain key",
			fmt.Sprintf("the domain secret has %d bytes, at least %d are needed", len(secret), minDomainSecret))
	}
	var d domain
	for _, part := range []struct {
		out   *[]byte
		label string
		size  int
	}{{&d.kek, domainWrapLabel, 32}, {&d.mac, domainMACLabel, 32}, {&d.check, domainCheckLabel, checkValueSize}} {
		key, err := hkdf.Key(sha256.New, secret, nil, part.label, part.size)
		if err != nil {
			return nil, fmt.Errorf("deriving the domain key: %w", err)
		}
		*part.out = key
	}
	return &d, nil
}

func (d *domain) wipe() {
	if d == nil {
		return
	}
	clear(d.kek)
	clear(d.mac)
}

func (d *domain) sum(msg []byte) []byte {
	h := hmac.New(sha256.New, d.mac)
	h.Write(msg)
	return h.Sum(nil)
}

// importKEK makes the domain key a session object that can wrap and unwrap and do
// nothing else.
func (d *domain) importKEK(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) (pkcs11.ObjectHandle, error) {
	return lib.CreateObject(sh, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, true),
		pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, true),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, false),
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, false),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN, false),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, false),
		pkcs11.NewAttribute(pkcs11.CKA_DERIVE, false),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE, d.kek),
	})
}
