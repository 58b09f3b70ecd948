package p11_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// The keys of one transfer have fates of their own, whichever protocol they go by.
func TestEachKeyOfATransferForItself(t *testing.T) {
	for _, way := range []string{"batch", "alone"} {
		t.Run(way, func(t *testing.T) { testFates(t, newEnds(t), way) })
	}
}

func testFates(t *testing.T, e *ends, way string) {
	ctx := t.Context()
	make := func(typ pluginproto.KeyType) pluginproto.Object { return generate(t, e.from, typ) }
	there := func(o pluginproto.Object) pluginproto.Object { e.arrives(t, o); return o }
	half := func(o pluginproto.Object, lost byte) pluginproto.Object {
		remove(t, e.to, there(o).ID, lost)
		return o
	}
	taken := func(o pluginproto.Object) pluginproto.Object {
		if _, err := e.to.Generate(ctx, pluginproto.KeySpec{ID: o.ID, Type: o.Type, Label: "was there first"}); err != nil {
			t.Fatal(err)
		}
		return o
	}
	half2 := func(o pluginproto.Object, lost byte) pluginproto.Object {
		remove(t, e.to, taken(o).ID, lost)
		return o
	}
	fates := []struct {
		name   string
		object pluginproto.Object
		want   string // in the error; "": it arrives
	}{
		{"a secret key", make(pluginproto.AES256), ""},
		{"a pair", make(pluginproto.ECP256), ""},
		{"a key that is there already", there(make(pluginproto.AES128)), ""},
		{"a pair that is there already", there(make(pluginproto.ECP256)), ""},
		{"a pair whose private half is there", half(make(pluginproto.ECP256), pkcs11.CKO_PUBLIC_KEY), ""},
		{"a pair whose public half is there", half(make(pluginproto.RSA2048), pkcs11.CKO_PRIVATE_KEY), ""},
		{"a key in whose place is another", taken(make(pluginproto.AES256)), "another key under this identity"},
		{"a pair in whose place is another", taken(make(pluginproto.ECP256)), "another key under this identity"},
		{"a pair in whose place is another's private half", half2(make(pluginproto.ECP256), pkcs11.CKO_PUBLIC_KEY), "another key under this identity"},
		{"a pair in whose place is another's public half", half2(make(pluginproto.ECP256), pkcs11.CKO_PRIVATE_KEY), "another key under this identity"},
		{"a key that the HSM does not take", make(pluginproto.AES256), "CKR_DEVICE_MEMORY"},
	}
	var ids []pluginproto.KeyID
	for _, f := range fates {
		ids = append(ids, f.object.ID)
	}
	refused := ids[len(ids)-1]
	e.do(func() {
		e.bend = func(p *parcel) {
			if bytes.Equal(p.ID, refused[:]) {
				p.Err = pkcs11.Error(pkcs11.CKR_DEVICE_MEMORY)
			}
		}
	})
	results, err := e.relay(way, ids...).run(t)
	e.do(e.heal)
	if err != nil || len(results) != len(ids) {
		t.Fatalf("%d results, %v", len(results), err)
	}
	for i, f := range fates {
		r := results[i]
		switch {
		case f.want != "" && (r.Object != nil || r.Err == nil || !strings.Contains(r.Err.Error(), f.want)):
			t.Errorf("%s: %v, %v, want %q", f.name, r.Object, r.Err, f.want)
		case f.want == "" && (r.Err != nil || r.Object == nil || !bytes.Equal(r.Object.CheckValue, f.object.CheckValue)):
			t.Errorf("%s: %v, %v", f.name, r.Object, r.Err)
		case f.want == "":
			if got, err := e.to.Inspect(ctx, ids[i]); err != nil || !bytes.Equal(got.CheckValue, f.object.CheckValue) || got.Label != f.object.Label {
				t.Errorf("%s, inspected: %+v, %v", f.name, got, err)
			}
		}
	}
	e.clean(t, refused)
	e.stillThere(t, ids[6], ids[7])
}

// stillThere wants the keys that were there first.
func (e *ends) stillThere(t testing.TB, ids ...pluginproto.KeyID) {
	t.Helper()
	for _, id := range ids {
		if o, err := e.to.Inspect(t.Context(), id); err != nil || o.Label != "was there first" {
			t.Errorf("the key that was there first: %+v, %v", o, err)
		}
	}
}

// A source shows what it has of each key, and gives that much.
func TestASourceThatHasSomeOfTheKeys(t *testing.T) {
	e := newEnds(t)
	aes, ec := generate(t, e.from, pluginproto.AES256), generate(t, e.from, pluginproto.ECP256)
	none, half := newID(), generate(t, e.from, pluginproto.ECP256)
	remove(t, e.from, half.ID, pkcs11.CKO_PRIVATE_KEY)
	for _, way := range []string{"batch", "alone"} {
		r := e.relay(way, none, aes.ID, half.ID, ec.ID)
		given, err := r.give(t)
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range []pluginproto.Class{pluginproto.ClassNotFound, 0, pluginproto.ClassNotFound, 0} {
			if k := given.Keys[i]; (k.Err != nil) != (want != 0) || (k.Object == nil) != (want != 0) || want != 0 && pluginproto.ClassOf(k.Err) != want {
				t.Errorf("key %d: %v, %v", i, k.Object, k.Err)
			}
		}
		taken, err := r.take(t)
		if err == nil && !taken.Done {
			if _, err = r.give(t); err == nil {
				taken, err = r.take(t)
			}
		}
		if err != nil || !taken.Done {
			t.Fatalf("the target: %+v, %v", taken, err)
		}
		for i, want := range []pluginproto.KeyID{{}, aes.ID, {}, ec.ID} {
			k := taken.Keys[i]
			if want == (pluginproto.KeyID{}) && k.Err == nil || want != (pluginproto.KeyID{}) && (k.Object == nil || k.Object.ID != want) {
				t.Errorf("key %d at the target: %v, %v", i, k.Object, k.Err)
			}
		}
		e.clean(t, none, half.ID)
		for _, id := range []pluginproto.KeyID{aes.ID, ec.ID} {
			if err := e.to.Destroy(t.Context(), id); err != nil {
				t.Error(err)
			}
		}
		if keys, err := e.relay(way, none, half.ID).run(t); err != nil || keys[0].Err == nil || keys[1].Err == nil {
			t.Errorf("keys that are not there: %+v, %v", keys, err)
		}
		e.clean(t)
	}
}

// A key that somebody has given another CKA_ID is found by what the HSM calls it.
func TestTheSameObjectUnderAnotherIdentity(t *testing.T) {
	e := newEnds(t)
	made, moved := generate(t, e.from, pluginproto.AES256), newID()
	e.arrives(t, made)
	uid := []byte("twelve bytes")
	e.do(func() { e.uids[string(made.ID[:])], e.uids[string(moved[:])] = uid, uid })
	var there pkcs11.ObjectHandle
	err := e.to.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) error {
		there = search(t, lib, sh, made.ID)[0]
		return lib.SetAttributeValue(sh, there, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, moved[:])})
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.to.List(t.Context()); err != nil { // as the core does before it fills a member
		t.Fatal(err)
	}
	for name, ill := range map[string]func(){
		"the HSM finds it by its UID": func() {},
		"the HSM does not take it":    func() { e.blind, e.bend = true, func(p *parcel) { p.Err = errTaken } },
		"the HSM answers with the one that it has": func() {
			e.blind, e.bend = true, func(p *parcel) { p.Err = errTaken }
			e.answer = func([]p11.Received) []p11.Received { return []p11.Received{{Object: there}} }
		},
	} {
		t.Run(name, func(t *testing.T) {
			e.do(ill)
			_, err := e.relay("batch", made.ID).run(t)
			e.do(e.heal)
			if pluginproto.ClassOf(err) != pluginproto.ClassCaller {
				t.Errorf("%v", err)
			}
			e.clean(t, made.ID)
			if o, err := e.to.Inspect(t.Context(), moved); err != nil || !bytes.Equal(o.CheckValue, made.CheckValue) {
				t.Fatalf("the key under its other identity: %v", err)
			}
		})
	}
}
