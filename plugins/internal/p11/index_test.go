package p11_test

import (
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/internal/faultlib"
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// A token with many keys takes long to look for one, so nobody asks it twice.
func TestAKeyWhosePlaceIsKnownIsNotLookedFor(t *testing.T) {
	d, lib := faulty(t)
	made, listed := generate(t, d, pluginproto.AES256).ID, newID()
	importKey(t, d, listed, pkcs11.CKK_AES, counting(32))
	if all, err := d.List(t.Context()); err != nil || len(all) != 2 {
		t.Fatalf("listed %v, %v", all, err)
	}
	lib.Arm(t, 0, faultlib.Fault{What: faultlib.Answer, Function: "C_FindObjectsInit", Times: faultlib.Forever, Arg: pkcs11.CKR_DEVICE_ERROR})
	for name, id := range map[string]pluginproto.KeyID{"a key that was made": made, "a key that was listed": listed} {
		if err := roundTrip(t.Context(), d, id); err != nil {
			t.Errorf("using %s: %v", name, err)
		}
		if _, err := d.CloneStep(t.Context(), pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: "aes-kwp", Keys: []pluginproto.KeyID{id}}); err != nil {
			t.Errorf("cloning %s: %v", name, err)
		}
		if _, err := d.Inspect(t.Context(), id); pluginproto.ClassOf(err) != pluginproto.ClassMember {
			t.Errorf("reading %s past every cache: %v", name, err)
		}
	}
	// To say that a key is not there takes a look, whatever was seen before.
	if err := roundTrip(t.Context(), d, newID()); pluginproto.ClassOf(err) != pluginproto.ClassMember {
		t.Errorf("using a key that is not there: %v", err)
	}
	lib.Disarm(t, 0)
}

// What other programs do on the token is noticed before a known place is used.
func TestAPlaceThatIsNoLongerTrueIsNotUsed(t *testing.T) {
	b := newBench(t, "token-a", "token-b")
	source := b.open(t)
	b.settings["token_label"] = "token-b"
	target := b.open(t)
	for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.ECP256} {
		id := generate(t, source, typ).ID
		clone(t, source, target, id)
		for name, d := range map[string]*p11.Driver{"source": source, "target": target} {
			if _, err := d.List(t.Context()); err != nil {
				t.Fatal(err)
			}
			if name == "target" {
				removeAll(t, d, id)
			}
		}
		clone(t, source, target, id) // makes good what was removed
		if _, err := target.Inspect(t.Context(), id); err != nil {
			t.Errorf("%s: the key is not there again: %v", typ, err)
		}
		removeAll(t, source, id)
		if err := tryClone(t, source, target, id); pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
			t.Errorf("%s: cloning a key that was removed: %v", typ, err)
		}
	}
}

// removeAll removes a key from the token past the driver.
func removeAll(t *testing.T, d *p11.Driver, id pluginproto.KeyID) {
	t.Helper()
	for _, class := range []byte{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY} {
		remove(t, d, id, class)
	}
}
