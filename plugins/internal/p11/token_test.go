package p11_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/hex"
	"errors"
	"fmt"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// importKey puts a key with known bytes on the token, past the driver.
func importKey(t testing.TB, d *p11.Driver, id pluginproto.KeyID, typ uint, value []byte) {
	t.Helper()
	err := d.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) error {
		template := []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, typ),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
			pkcs11.NewAttribute(pkcs11.CKA_ID, id[:]),
			pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, typ == pkcs11.CKK_AES),
			pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, typ == pkcs11.CKK_AES),
			pkcs11.NewAttribute(pkcs11.CKA_SIGN, typ != pkcs11.CKK_AES),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE, value),
		}
		_, err := lib.CreateObject(sh, template)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func counting(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

// The check values of keys with the bytes 0, 1, 2, ... as OpenSSL computes them.
// Catalogs and blobs hold such values, so they never change.
func TestGoldenCheckValues(t *testing.T) {
	d := newBench(t).open(t)
	for _, tc := range []struct {
		typ  pluginproto.KeyType
		ckk  uint
		size int
		want string
	}{
		{pluginproto.AES128, pkcs11.CKK_AES, 16, "cffff26b1885ed45"},
		{pluginproto.AES256, pkcs11.CKK_AES, 32, "9bb898b4535234c1"},
		{pluginproto.HMACSHA256, pkcs11.CKK_GENERIC_SECRET, 32, "acffb6d8e9e4f244"},
	} {
		id := newID()
		importKey(t, d, id, tc.ckk, counting(tc.size))
		o, err := d.Inspect(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if o.Type != tc.typ || hex.EncodeToString(o.CheckValue) != tc.want {
			t.Errorf("%s: %s with the check value %x", tc.typ, o.Type, o.CheckValue)
		}
	}
}

func TestGCMIsTheOneEverybodyHas(t *testing.T) {
	d := newBench(t).open(t)
	id := newID()
	importKey(t, d, id, pkcs11.CKK_AES, counting(32))
	cmd := pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: id,
		Input: []byte("text"), IV: counting(12), AAD: []byte("aad")}
	got, err := d.Do(t.Context(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(counting(32))
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	if want := gcm.Seal(nil, cmd.IV, cmd.Input, cmd.AAD); !bytes.Equal(got.Output, want) {
		t.Errorf("%x, want %x", got.Output, want)
	}
	if !bytes.Equal(got.IV, cmd.IV) {
		t.Errorf("another IV was used: %x", got.IV)
	}
}

// Every key on the token is private and sensitive, and its use is as narrow as
// its type, be it generated or cloned.
func TestAttributesOnTheToken(t *testing.T) {
	b := newBench(t, "token-a", "token-b")
	source := b.open(t)
	b.settings["token_label"] = "token-b"
	target := b.open(t)
	for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.HMACSHA256, pluginproto.RSA2048, pluginproto.ECP256} {
		o := generate(t, source, typ)
		clone(t, source, target, o.ID)
		for name, d := range map[string]*p11.Driver{"generated": source, "cloned": target} {
			t.Run(fmt.Sprintf("%s, %s", typ, name), func(t *testing.T) { checkAttributes(t, d, o) })
		}
	}
}

func checkAttributes(t *testing.T, d *p11.Driver, o pluginproto.Object) {
	rsa := o.Type == pluginproto.RSA2048
	want := map[uint]map[uint]bool{ // :: class → attribute → value
		pkcs11.CKO_PUBLIC_KEY: {pkcs11.CKA_VERIFY: true, pkcs11.CKA_ENCRYPT: rsa, pkcs11.CKA_WRAP: false},
		pkcs11.CKO_PRIVATE_KEY: {
			pkcs11.CKA_PRIVATE: true, pkcs11.CKA_SENSITIVE: true, pkcs11.CKA_EXTRACTABLE: true,
			pkcs11.CKA_SIGN: true, pkcs11.CKA_DECRYPT: rsa, pkcs11.CKA_UNWRAP: false, pkcs11.CKA_DERIVE: false,
		},
		pkcs11.CKO_SECRET_KEY: {
			pkcs11.CKA_PRIVATE: true, pkcs11.CKA_SENSITIVE: true, pkcs11.CKA_EXTRACTABLE: true,
			pkcs11.CKA_ENCRYPT: o.Type == pluginproto.AES256, pkcs11.CKA_DECRYPT: o.Type == pluginproto.AES256,
			pkcs11.CKA_SIGN: o.Type != pluginproto.AES256, pkcs11.CKA_VERIFY: o.Type != pluginproto.AES256,
			pkcs11.CKA_WRAP: false, pkcs11.CKA_UNWRAP: false, pkcs11.CKA_DERIVE: false,
		},
	}
	err := d.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) error {
		for _, h := range search(t, lib, sh, o.ID) {
			got, err := lib.GetAttributeValue(sh, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil), pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
			if err != nil {
				return err
			}
			class := uint(got[0].Value[0])
			if string(got[1].Value) != o.Label {
				t.Errorf("class %d: the label is %q", class, got[1].Value)
			}
			for attr, value := range want[class] {
				got, err := lib.GetAttributeValue(sh, h, []*pkcs11.Attribute{pkcs11.NewAttribute(attr, nil)})
				if err != nil {
					return err
				}
				if (got[0].Value[0] != 0) != value {
					t.Errorf("class %d: attribute 0x%X is %v", class, attr, !value)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestForeignObjectsDoNoHarm(t *testing.T) {
	d := newBench(t).open(t)
	o := generate(t, d, pluginproto.AES256)
	strange := newID()
	err := d.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) error {
		_, err := lib.GenerateKey(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_DES3_KEY_GEN, nil)}, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, strange[:]),
		})
		data := []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_VALUE, "x"),
		}
		short := []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, "short"), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
		}
		_, derr := lib.CreateObject(sh, data)
		_, serr := lib.GenerateKey(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, short)
		return errors.Join(err, derr, serr)
	})
	if err != nil {
		t.Fatal(err)
	}
	all, err := d.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 1 || all[0].ID != o.ID {
		t.Errorf("listed: %v", all)
	}
	if _, err := d.Inspect(t.Context(), strange); pluginproto.ClassOf(err) != pluginproto.ClassCaller {
		t.Errorf("a DES key: %v", err)
	}
}

// clone relays a key from one token to the other.
func clone(t testing.TB, from, to *p11.Driver, id pluginproto.KeyID) {
	t.Helper()
	if err := tryClone(t, from, to, id); err != nil {
		t.Fatal(err)
	}
}

func tryClone(t testing.TB, from, to *p11.Driver, id pluginproto.KeyID) error {
	t.Helper()
	transfer := newID()
	out, err := from.CloneStep(t.Context(), pluginproto.CloneRequest{Transfer: transfer, Role: pluginproto.CloneSource, Protocol: "aes-kwp", Keys: []pluginproto.KeyID{id}})
	if err != nil {
		return err
	}
	in, err := to.CloneStep(t.Context(), pluginproto.CloneRequest{Transfer: transfer, Role: pluginproto.CloneTarget, Protocol: "aes-kwp", Keys: []pluginproto.KeyID{id}, Blob: out.Blob})
	if err == nil && (!in.Done || len(in.Keys) != 1) {
		return errors.New("the target is not done")
	}
	return err
}

// remove destroys one class of the objects under an identity, as a crash between
// two steps leaves them.
func remove(t *testing.T, d *p11.Driver, id pluginproto.KeyID, class byte) {
	t.Helper()
	err := d.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) error {
		for _, h := range search(t, lib, sh, id) {
			got, err := lib.GetAttributeValue(sh, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil)})
			if err != nil {
				return err
			}
			if got[0].Value[0] == class {
				if err := lib.DestroyObject(sh, h); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestHalfAPairIsNoKey(t *testing.T) {
	b := newBench(t, "token-a", "token-b")
	source := b.open(t)
	b.settings["token_label"] = "token-b"
	target := b.open(t)
	for _, lost := range []struct {
		name  string
		class byte
	}{{"public", pkcs11.CKO_PUBLIC_KEY}, {"private", pkcs11.CKO_PRIVATE_KEY}} {
		for _, typ := range []pluginproto.KeyType{pluginproto.ECP256, pluginproto.RSA2048} {
			t.Run(lost.name+" half lost, "+string(typ), func(t *testing.T) { testHalf(t, source, target, typ, lost.class) })
		}
	}
}

func testHalf(t *testing.T, source, target *p11.Driver, typ pluginproto.KeyType, lost byte) {
	ctx := t.Context()
	o := generate(t, source, typ)
	half := func() {
		clone(t, source, target, o.ID)
		remove(t, target, o.ID, lost)
	}
	half()
	if _, err := target.Inspect(ctx, o.ID); pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
		t.Errorf("reading: %v", err)
	}
	all, err := target.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range all {
		if other.ID == o.ID {
			t.Error("it is listed")
		}
	}
	if _, err := target.Generate(ctx, pluginproto.KeySpec{ID: o.ID, Type: typ}); pluginproto.ClassOf(err) != pluginproto.ClassCaller {
		t.Errorf("generating over it: %v", err)
	}
	clone(t, source, target, o.ID) // completes it
	if got, err := target.Inspect(ctx, o.ID); err != nil || !bytes.Equal(got.CheckValue, o.CheckValue) {
		t.Errorf("reading the completed pair: %v", err)
	}
	remove(t, target, o.ID, lost)
	if err := target.Destroy(ctx, o.ID); err != nil {
		t.Errorf("destroying what is left: %v", err)
	}
	if err := target.Destroy(ctx, o.ID); pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
		t.Errorf("destroying nothing: %v", err)
	}

	// Half of another key under the same identity is not touched.
	if _, err := target.Generate(ctx, pluginproto.KeySpec{ID: o.ID, Type: typ}); err != nil {
		t.Fatal(err)
	}
	remove(t, target, o.ID, lost)
	if err := tryClone(t, source, target, o.ID); pluginproto.ClassOf(err) != pluginproto.ClassCaller {
		t.Errorf("cloning over half of another key: %v", err)
	}
	if err := target.Destroy(ctx, o.ID); err != nil {
		t.Errorf("it is gone: %v", err)
	}
}

func TestTwoKeysUnderOneIdentityAreNotUsed(t *testing.T) {
	d := newBench(t).open(t)
	id := newID()
	importKey(t, d, id, pkcs11.CKK_AES, counting(32))
	importKey(t, d, id, pkcs11.CKK_AES, counting(16))
	if _, err := d.Inspect(t.Context(), id); pluginproto.ClassOf(err) != pluginproto.ClassUnknown {
		t.Errorf("reading: %v", err)
	}
	if err := roundTrip(t.Context(), d, id); pluginproto.ClassOf(err) != pluginproto.ClassUnknown {
		t.Errorf("using: %v", err)
	}
	if all, err := d.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("listed: %v, %v", all, err)
	}
}
