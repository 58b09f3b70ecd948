package p11_test

import (
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// foreignKey makes a key on the token as pkcs11-tool --keygen --key-type AES:32 does,
// with some attributes of the caller's.
func foreignKey(t *testing.T, d *p11.Driver, more map[uint]bool) pluginproto.KeyID {
	t.Helper()
	id := newID()
	attrs := map[uint]bool{
		pkcs11.CKA_TOKEN: true, pkcs11.CKA_PRIVATE: true, pkcs11.CKA_SENSITIVE: true,
		pkcs11.CKA_ENCRYPT: true, pkcs11.CKA_DECRYPT: true, pkcs11.CKA_VERIFY: true,
		pkcs11.CKA_WRAP: true, pkcs11.CKA_UNWRAP: true,
	}
	for a, v := range more {
		attrs[a] = v
	}
	template := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32), pkcs11.NewAttribute(pkcs11.CKA_LABEL, "till"), pkcs11.NewAttribute(pkcs11.CKA_ID, id[:]),
	}
	for a, v := range attrs {
		template = append(template, pkcs11.NewAttribute(a, v))
	}
	err := d.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) error {
		_, err := lib.GenerateKey(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, template)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// A key that another program made serves as far as its own attributes allow, and
// what they do not allow is refused with the reason.
func TestForeignKeysDoWhatTheirAttributesAllow(t *testing.T) {
	b := newBench(t, "token-a", "token-b")
	source := b.open(t)
	b.settings["token_label"] = "token-b"
	target := b.open(t)
	for _, tc := range []struct {
		name    string
		attrs   map[uint]bool
		unseen  bool   // it is not listed
		useless bool   // it cannot wrap
		refusal string // of a clone, "" when it can be cloned
	}{
		{name: "extractable and sensitive", attrs: map[uint]bool{pkcs11.CKA_EXTRACTABLE: true}},
		{name: "extractable and not sensitive", attrs: map[uint]bool{pkcs11.CKA_EXTRACTABLE: true, pkcs11.CKA_SENSITIVE: false}},
		{name: "extractable and not modifiable", attrs: map[uint]bool{pkcs11.CKA_EXTRACTABLE: true, pkcs11.CKA_MODIFIABLE: false}},
		{name: "extractable and not copyable", attrs: map[uint]bool{pkcs11.CKA_EXTRACTABLE: true, pkcs11.CKA_COPYABLE: false}},
		{name: "not extractable", refusal: "CKA_EXTRACTABLE is false"},
		{name: "not extractable, modifiable or copyable", refusal: "CKA_EXTRACTABLE is false",
			attrs: map[uint]bool{pkcs11.CKA_MODIFIABLE: false, pkcs11.CKA_COPYABLE: false}},
		{name: "for trusted wrapping keys only", refusal: "CKA_WRAP_WITH_TRUSTED",
			attrs: map[uint]bool{pkcs11.CKA_EXTRACTABLE: true, pkcs11.CKA_WRAP_WITH_TRUSTED: true}},
		{name: "for decryption only", unseen: true, useless: true, refusal: "CKR_KEY_FUNCTION_NOT_PERMITTED",
			attrs: map[uint]bool{pkcs11.CKA_EXTRACTABLE: true, pkcs11.CKA_ENCRYPT: false}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			id := foreignKey(t, source, tc.attrs)
			all, err := source.List(t.Context())
			if err != nil {
				t.Fatalf("it stops the listing: %v", err)
			}
			seen := false
			for _, o := range all {
				seen = seen || o.ID == id && o.Type == pluginproto.AES256 && o.Label == "till"
			}
			if seen == tc.unseen {
				t.Errorf("listed: %v", all)
			}
			if err := roundTrip(t.Context(), source, id); (err != nil) != tc.useless || err != nil && pluginproto.ClassOf(err) != pluginproto.ClassCaller {
				t.Errorf("using it: %v", err)
			}
			err = tryClone(t, source, target, id)
			if tc.refusal != "" {
				if pluginproto.ClassOf(err) != pluginproto.ClassCaller || !strings.Contains(err.Error(), tc.refusal) {
					t.Errorf("cloning it: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatalf("cloning it: %v", err)
			}
			if err := roundTrip(t.Context(), target, id); err != nil {
				t.Errorf("using its clone: %v", err)
			}
			if err := source.Destroy(t.Context(), id); err != nil {
				t.Errorf("destroying it: %v", err)
			}
		})
	}
}
