package lunasim_test

import (
	"bytes"
	"slices"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
)

func TestTemplatesAreLunas(t *testing.T) {
	k := start(t, lunasim.Options{})
	for _, c := range []struct {
		name string
		attr *pkcs11.Attribute
		want uint
	}{
		{"sensitive", attr(pkcs11.CKA_SENSITIVE, true), 0},
		{"not sensitive", attr(pkcs11.CKA_SENSITIVE, false), pkcs11.CKR_ATTRIBUTE_VALUE_INVALID},
		{"extractable", attr(pkcs11.CKA_EXTRACTABLE, true), pkcs11.CKR_ATTRIBUTE_VALUE_INVALID},
		{"not private", attr(pkcs11.CKA_PRIVATE, false), pkcs11.CKR_ATTRIBUTE_VALUE_INVALID},
		{"an OUID of the caller's", attr(ckaOUID, make([]byte, 12)), pkcs11.CKR_ATTRIBUTE_READ_ONLY},
		{"a boolean of four bytes", attr(pkcs11.CKA_SENSITIVE, make([]byte, 4)), pkcs11.CKR_ATTRIBUTE_VALUE_INVALID},
	} {
		_, err := k.tryAES("k", c.attr)
		wantCode(t, "a key that is "+c.name, code(err), c.want)
	}
	if n := len(k.p.KeyBytes(t)); n != 1 {
		t.Errorf("there are %d keys", n)
	}
}

func TestKeysComeInByCloningAlone(t *testing.T) {
	k := start(t, lunasim.Options{})
	create := func(token bool) error {
		_, err := k.CreateObject(k.h, []*pkcs11.Attribute{
			attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attr(pkcs11.CKA_TOKEN, token),
			attr(pkcs11.CKA_VALUE, make([]byte, 32)),
		})
		return err
	}
	wantCode(t, "a session object", code(create(false)), 0)
	wantCode(t, "a token object", code(create(true)), pkcs11.CKR_TEMPLATE_INCONSISTENT)
	k.p.Set("create_secrets", "no")
	wantCode(t, "a session object, by the other reading", code(create(false)), pkcs11.CKR_TEMPLATE_INCONSISTENT)
	k.p.Set("create_secrets", "yes")
	k.p.Set("hsm.12", "0")
	wantCode(t, "in FIPS mode", code(create(false)), pkcs11.CKR_TEMPLATE_INCONSISTENT)
	public, err := k.CreateObject(k.h, []*pkcs11.Attribute{
		attr(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), attr(pkcs11.CKA_TOKEN, true),
		attr(pkcs11.CKA_MODULUS, bytes.Repeat([]byte{0xc3}, 256)), attr(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
	})
	if err != nil || len(k.get(public, ckaOUID)) != 12 {
		t.Errorf("a public key: %v", err)
	}
}

func TestKeysLeaveWrappedOnExportPartitionsAlone(t *testing.T) {
	wrap := func(k *token, key pkcs11.ObjectHandle, mechanism uint) ([]byte, error) {
		kek, err := k.tryAES("kek", attr(pkcs11.CKA_WRAP, true), attr(pkcs11.CKA_UNWRAP, true))
		if err != nil {
			t.Fatal(err)
		}
		return k.WrapKey(k.h, mech(mechanism, nil), kek, key)
	}
	cloning := start(t, lunasim.Options{})
	_, err := wrap(cloning, cloning.aes("k"), 0x80000171)
	wantCode(t, "wrapping on a partition that clones", code(err), pkcs11.CKR_KEY_UNEXTRACTABLE)

	export := start(t, lunasim.Options{Kind: "export"})
	_, err = wrap(export, export.aes("k"), 0x80000171)
	wantCode(t, "wrapping a key that was not made to leave", code(err), pkcs11.CKR_KEY_UNEXTRACTABLE)
	leaves, err := export.tryAES("l", attr(pkcs11.CKA_EXTRACTABLE, true))
	if err != nil {
		t.Fatal(err)
	}
	if v := export.get(leaves, pkcs11.CKA_NEVER_EXTRACTABLE); v[0] != 0 {
		t.Error("it claims that it was never extractable")
	}
	for _, mechanism := range []uint{0x80000170, 0x80000171} {
		wrapped, err := wrap(export, leaves, mechanism)
		if err != nil || len(wrapped) != 40 {
			t.Errorf("wrapping with %#x: %d bytes, %v", mechanism, len(wrapped), err)
		}
	}
}

func TestMechanismsOfALuna(t *testing.T) {
	k := open(t, lunasim.New(t, lunasim.Options{}))
	list, err := k.GetMechanismList(firstLunaSlot)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []uint{pkcs11.CKM_AES_GCM, pkcs11.CKM_RSA_X_509, 0x80000170, 0x80000171} {
		if !slices.ContainsFunc(list, func(m *pkcs11.Mechanism) bool { return m.Mechanism == want }) {
			t.Errorf("mechanism %#x is not offered", want)
		}
		if _, err := k.GetMechanismInfo(firstLunaSlot, mech(want, nil)); err != nil {
			t.Errorf("mechanism %#x: %v", want, err)
		}
	}
}

func TestObjectsAreFoundByWhatTheyClaim(t *testing.T) {
	k := start(t, lunasim.Options{})
	a := k.aes("a")
	k.aes("b")
	k.rsa("r")
	for _, c := range []struct {
		name string
		t    []*pkcs11.Attribute
		want int
	}{
		{"everything", nil, 4},
		{"what cannot be extracted", []*pkcs11.Attribute{attr(pkcs11.CKA_EXTRACTABLE, false)}, 3},
		{"what is sensitive and secret", []*pkcs11.Attribute{attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY)}, 2},
		{"by its label", []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, "label of a")}, 1},
		{"by its OUID", []*pkcs11.Attribute{attr(ckaOUID, k.get(a, ckaOUID))}, 1},
		{"by half of a label", []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, "label")}, 0},
		{"what can be extracted", []*pkcs11.Attribute{attr(pkcs11.CKA_EXTRACTABLE, true)}, 0},
	} {
		if got := len(k.find(c.t...)); got != c.want {
			t.Errorf("%s: found %d, want %d", c.name, got, c.want)
		}
	}
}

func TestAnOUIDIsForLife(t *testing.T) {
	k := start(t, lunasim.Options{})
	key := k.aes("k")
	ouid := k.ouid(key)
	if err := k.SetAttributeValue(k.h, key, []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, "another"), attr(pkcs11.CKA_ID, []byte("z"))}); err != nil {
		t.Fatal(err)
	}
	if k.ouid(key) != ouid || string(k.get(key, pkcs11.CKA_LABEL)) != "another" {
		t.Errorf("the key is %s %q", k.ouid(key), k.get(key, pkcs11.CKA_LABEL))
	}
	copied, err := k.CopyObject(k.h, key, []*pkcs11.Attribute{attr(pkcs11.CKA_ID, []byte("c"))})
	if err != nil {
		t.Fatal(err)
	}
	if k.ouid(copied) == ouid {
		t.Error("a copy has the OUID of what it was copied from")
	}
	if string(k.get(copied, pkcs11.CKA_LABEL)) != "another" || k.get(copied, pkcs11.CKA_EXTRACTABLE)[0] != 0 {
		t.Error("a copy is something else than what it was copied from")
	}
	k.p.Set("copy", "no")
	_, err = k.CopyObject(k.h, key, nil)
	wantCode(t, "a copy, by the other reading", code(err), pkcs11.CKR_FUNCTION_NOT_SUPPORTED)

	for _, c := range []struct {
		of, by string
		args   []any
	}{
		{"CA_GetObjectUID", "CA_GetObjectHandle", []any{firstLunaSlot, 1}},
		{"CA_GetTokenObjectUID", "CA_GetTokenObjectHandle", []any{firstLunaSlot}},
	} {
		got := make([]byte, 12)
		wantCode(t, c.of, k.ca.Call(c.of, append(slices.Clone(c.args), 0, uint(key), got)...), 0)
		if !bytes.Equal(got, k.get(key, ckaOUID)) {
			t.Errorf("%s: %x", c.of, got)
		}
		typ, handle := uint(9), uint(0)
		wantCode(t, c.by, k.ca.Call(c.by, append(slices.Clone(c.args), got, &typ, &handle)...), 0)
		if typ != 0 || handle != uint(key) {
			t.Errorf("%s: type %d, handle %d", c.by, typ, handle)
		}
		wantCode(t, c.by+" of nothing", k.ca.Call(c.by, append(slices.Clone(c.args), make([]byte, 12), &typ, &handle)...), pkcs11.CKR_OBJECT_HANDLE_INVALID)
	}
}

func TestAFullPartitionTakesNoMore(t *testing.T) {
	k := start(t, lunasim.Options{Switches: map[string]string{"limit_objects": "2"}})
	k.aes("a")
	k.aes("b")
	_, err := k.tryAES("c")
	wantCode(t, "a third key", code(err), ckrStorageFull)
	target := k
	source := start(t, lunasim.Options{})
	wantCode(t, "a clone", newCPv3(source, target, source.aes("c")).run(), ckrStorageFull)
	for function, args := range map[string][]any{
		"CA_GetTokenStorageInformation":     {firstLunaSlot},
		"CA_GetContainerStorageInformation": {firstLunaSlot, 1},
	} {
		var overhead, total, used, free, objects uint
		wantCode(t, function, k.ca.Call(function, append(args, &overhead, &total, &used, &free, &objects)...), 0)
		if objects != 2 || free != 0 || total == 0 || used != total {
			t.Errorf("%s: total %d, used %d, free %d, objects %d", function, total, used, free, objects)
		}
	}
	if err := k.DestroyObject(k.h, k.find(attr(pkcs11.CKA_ID, []byte("a")))[0]); err != nil {
		t.Fatal(err)
	}
	k.aes("c")
}

func TestPoliciesCanBeRead(t *testing.T) {
	k := open(t, lunasim.New(t, lunasim.Options{Policies: map[int]int{4: 0}, HSMPolicies: map[int]int{12: 0}}))
	for _, c := range []struct {
		function string
		args     []any
		id, want uint
	}{
		{"CA_GetTokenPolicies", nil, 0, 1},
		{"CA_GetTokenPolicies", nil, 4, 0},
		{"CA_GetTokenPolicies", nil, 42, 0},
		{"CA_GetContainerPolicySet", []any{1}, 4, 0},
		{"CA_GetTokenCapabilities", nil, 4, 1},
		{"CA_GetHSMPolicySet", nil, 7, 1},
		{"CA_GetHSMPolicySet", nil, 12, 0},
		{"CA_GetHSMCapabilitySet", nil, 12, 1},
	} {
		args := append([]any{firstLunaSlot}, c.args...)
		var n, m uint
		wantCode(t, c.function, k.ca.Call(c.function, append(slices.Clone(args), []byte(nil), &n, []byte(nil), &m)...), 0)
		ids, values := make([]byte, 8*n), make([]byte, 8*m)
		wantCode(t, c.function, k.ca.Call(c.function, append(args, ids, &n, values, &m)...), 0)
		got := map[uint]uint{}
		for i := range int(n) {
			got[word(ids[8*i:])] = word(values[8*i:])
		}
		if v, ok := got[c.id]; !ok || v != c.want {
			t.Errorf("%s: policy %d is %d, %v; want %d", c.function, c.id, v, ok, c.want)
		}
	}
	k.p.Set("policy.42", "unknown")
	var n, m uint
	k.ca.Call("CA_GetTokenPolicies", firstLunaSlot, []byte(nil), &n, []byte(nil), &m)
	short := uint(1)
	wantCode(t, "too little room", k.ca.Call("CA_GetTokenPolicies", firstLunaSlot, make([]byte, 8), &short, make([]byte, 8), &short), pkcs11.CKR_BUFFER_TOO_SMALL)
	if n != 16 {
		t.Errorf("there are %d policies", n)
	}
}

func TestVirtualSlotsComeBesideOrAlone(t *testing.T) {
	k := open(t, lunasim.New(t, lunasim.Options{Label: "physical", Serial: "599447001", Switches: map[string]string{"ha_slot": "yes"}}))
	slots, err := k.GetSlotList(true)
	if err != nil || !slices.Equal(slots, []uint{0, 1}) {
		t.Fatalf("the slots are %v, %v", slots, err)
	}
	for _, only := range []string{"no", "yes"} {
		k.p.Set("ha_only", only)
		slots, err := k.GetSlotList(true)
		if err != nil {
			t.Fatal(err)
		}
		info, err := k.GetTokenInfo(slots[len(slots)-1])
		if err != nil || info.Model != "LunaVirtual" || info.SerialNumber != "1599447001" || info.Label != "ha-group" {
			t.Errorf("HAOnly %s: the token is %+v, %v", only, info, err)
		}
		if want := map[string]int{"no": 2, "yes": 1}[only]; len(slots) != want {
			t.Errorf("HAOnly %s: the slots are %v", only, slots)
		}
	}
	_, err = k.OpenSession(1, rwSession)
	wantCode(t, "a slot that is gone", code(err), pkcs11.CKR_SLOT_ID_INVALID)
}

func TestFunctionsMayBeMissing(t *testing.T) {
	k := load(t, lunasim.New(t, lunasim.Options{Without: []string{"CA_GetContainerStatus", "CA_Extract"}}))
	for function, want := range map[string]bool{
		"CA_GetContainerStatus": false, "CA_Extract": false, "CA_Insert": true, "CA_CloneObject": true, "C_GetFunctionList": true,
	} {
		if k.ca.Has(function) != want {
			t.Errorf("%s is there: %v", function, !want)
		}
	}
}
