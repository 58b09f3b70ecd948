package p11_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/internal/softhsmtest"
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// What an HSM says has come is believed only when the token shows it, and a transfer that
// fails at any step leaves nothing.
func TestTransfersThatFail(t *testing.T) {
	e := newEnds(t)
	others := map[uint][]byte{ // :: class → a key of it as it travels
		pkcs11.CKO_SECRET_KEY:  e.packed(t, generate(t, e.from, pluginproto.AES256).ID).Wrapped,
		pkcs11.CKO_PRIVATE_KEY: e.packed(t, generate(t, e.from, pluginproto.ECP256).ID).Wrapped,
	}
	bent := func(f func(*parcel)) func() { return func() { e.bend = f } }
	fails := func(step string, ckr uint) func() { return func() { e.fail[step] = pkcs11.Error(ckr) } }
	for _, tc := range []struct {
		name  string
		ill   func()
		class pluginproto.Class
		want  string
	}{
		{"another identity comes", bent(func(p *parcel) { p.ID = append([]byte{0xFF}, p.ID[1:]...) }), pluginproto.ClassCaller, "not the one that the source described"},
		{"no identity comes", bent(func(p *parcel) { p.ID = nil }), pluginproto.ClassCaller, "not the one that the source described"},
		{"another key comes", bent(func(p *parcel) { p.Wrapped = others[p.Class] }), pluginproto.ClassCaller, "not the one that the source described"},
		{"a key of another kind comes", bent(func(p *parcel) { p.CKK = pkcs11.CKK_GENERIC_SECRET; p.Uses = nil }), pluginproto.ClassCaller, ""},
		{"a key that everybody may read comes", bent(func(p *parcel) { p.Stays = false }), pluginproto.ClassCaller, "stays on the token"},
		{"a key comes that is the session's", bent(func(p *parcel) { p.Fleeting = true }), pluginproto.ClassCaller, "stays on the token"},
		{"the HSM is full", bent(func(p *parcel) { p.Err = pkcs11.Error(pkcs11.CKR_DEVICE_MEMORY) }), pluginproto.ClassBusy, "CKR_DEVICE_MEMORY"},
		{"the HSM has the object already", bent(func(p *parcel) { p.Err = errTaken }), pluginproto.ClassCaller, "has this very object already"},
		{"more objects come than were asked for", func() {
			e.answer = func(r []p11.Received) []p11.Received { return append(r, p11.Received{Err: errTaken}) }
		}, pluginproto.ClassMember, "2 objects came where 1"},
		{"the source cannot begin", fails("source begins", pkcs11.CKR_SESSION_COUNT), pluginproto.ClassBusy, "CKR_SESSION_COUNT"},
		{"the source's first step fails", fails("source 0", pkcs11.CKR_DEVICE_ERROR), pluginproto.ClassMember, "CKR_DEVICE_ERROR"},
		{"the target cannot begin", fails("target begins", pkcs11.CKR_DEVICE_ERROR), pluginproto.ClassMember, "CKR_DEVICE_ERROR"},
		{"the target's first step fails", fails("target 0", pkcs11.CKR_DEVICE_ERROR), pluginproto.ClassMember, "CKR_DEVICE_ERROR"},
		{"the source's last step fails", fails("source 1", pkcs11.CKR_KEY_UNEXTRACTABLE), pluginproto.ClassCaller, "CKR_KEY_UNEXTRACTABLE"},
		{"the target's last step fails before anything came", fails("target 1", pkcs11.CKR_DEVICE_ERROR), pluginproto.ClassMember, "CKR_DEVICE_ERROR"},
		{"the target's last step fails after all has come", fails("target ends", pkcs11.CKR_DEVICE_ERROR), pluginproto.ClassMember, "CKR_DEVICE_ERROR"},
		{"a session is lost between steps", fails("source 1", pkcs11.CKR_SESSION_HANDLE_INVALID), pluginproto.ClassUnknown, "begin another"},
	} {
		for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.ECP256} {
			if typ == pluginproto.ECP256 && strings.Contains(tc.name, "of another kind") {
				continue // it does not even become an object
			}
			t.Run(tc.name+", "+string(typ), func(t *testing.T) {
				made := generate(t, e.from, typ)
				e.do(tc.ill)
				_, err := e.relay("batch", made.ID).run(t)
				e.do(e.heal)
				if pluginproto.ClassOf(err) != tc.class || err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("%v, of class %s, want %s and %q", err, pluginproto.ClassOf(err), tc.class, tc.want)
				}
				e.clean(t, made.ID)
				e.arrives(t, made)
			})
		}
	}
}

// heal ends all misbehaviour.
func (w *world) heal() {
	well := newWorld()
	w.fail, w.before, w.bend, w.answer, w.blind, w.lost = well.fail, well.before, well.bend, well.answer, false, false
}

// packed is a key as it travels.
func (e *ends) packed(t testing.TB, id pluginproto.KeyID) (p parcel) {
	t.Helper()
	defer e.do(e.heal)
	e.do(func() { e.bend = func(got *parcel) { p = *got } })
	if _, err := e.relay("batch", id).run(t); err != nil {
		t.Fatal(err)
	}
	return p
}

// arrives wants a key to come now.
func (e *ends) arrives(t testing.TB, made pluginproto.Object) {
	t.Helper()
	got, err := e.relay("batch", made.ID).run(t)
	if err != nil || got[0].Object == nil || !slices.Equal(got[0].Object.CheckValue, made.CheckValue) {
		t.Fatalf("after that: %+v, %v", got, err)
	}
	if inspected, err := e.to.Inspect(t.Context(), made.ID); err != nil || inspected.Label != made.Label {
		t.Errorf("inspecting what has come: %+v, %v", inspected, err)
	}
}

// An object that stays on the source must not come as one that can leave the target.
func TestAKeyThatCouldLeaveIsNotKept(t *testing.T) {
	w, b := newWorld(), newBench(t, "token-a", "token-b")
	e := &ends{world: w, bench: b}
	b.settings["module"] = sealedLibrary(t, softhsmtest.Module(t))
	e.from = e.start(t, "token-a")
	made := generate(t, e.from, pluginproto.AES256)
	r := e.relay("alone", made.ID)
	if _, err := r.give(t); err != nil {
		t.Fatal(err)
	}
	if err := e.from.Close(); err != nil {
		t.Fatal(err)
	}
	b.settings["module"] = softhsmtest.Module(t) // which tells the truth
	e.to = e.start(t, "token-b")
	w.bend = func(p *parcel) { p.Leaves = true }
	r.to = e.to
	for _, r.target.Prove = range []bool{false, true} {
		r.target.Step = 0
		if _, err := r.take(t); pluginproto.ClassOf(err) != pluginproto.ClassCaller || !strings.Contains(err.Error(), "stays on the token") {
			t.Errorf("proving %v: %v", r.target.Prove, err)
		}
		if err := e.to.Destroy(t.Context(), made.ID); pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
			t.Errorf("it is on the token: %v", err)
		}
	}
	w.bend = func(*parcel) {}
	r.target.Step = 0
	if _, err := r.take(t); err != nil {
		t.Errorf("a key that stays: %v", err)
	}
}

// With an extension nothing that is made can be extracted, wherever it is made.
func TestKeysThatNeverLeaveAreMadeSo(t *testing.T) {
	for _, onToken := range []bool{true, false} {
		q := newWorld().quirks()
		q.OnToken = onToken
		d := p11.New(q, p11.Options{})
		b := newBench(t)
		if _, err := d.Open(t.Context(), b.request()); err != nil {
			t.Fatal(err)
		}
		for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.HMACSHA256, pluginproto.RSA2048, pluginproto.ECP384} {
			id := generate(t, d, typ).ID
			err := d.Raw(func(lib *pkcs11.Ctx, sh pkcs11.SessionHandle) error {
				for _, h := range search(t, lib, sh, id) {
					for attr, want := range map[uint]byte{
						pkcs11.CKA_TOKEN: 1, pkcs11.CKA_PRIVATE: 1, pkcs11.CKA_SENSITIVE: 1, pkcs11.CKA_EXTRACTABLE: 0,
						pkcs11.CKA_NEVER_EXTRACTABLE: 1, pkcs11.CKA_ALWAYS_SENSITIVE: 1, pkcs11.CKA_LOCAL: 1,
					} {
						got, err := lib.GetAttributeValue(sh, h, []*pkcs11.Attribute{
							pkcs11.NewAttribute(attr, nil), pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil)})
						if errors.Is(err, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_TYPE_INVALID)) {
							continue // the public half
						}
						if err != nil {
							return err
						}
						if got[1].Value[0] != pkcs11.CKO_PUBLIC_KEY && got[0].Value[0] != want {
							t.Errorf("on the token %v, %s: attribute %#x is %v", onToken, typ, attr, got[0].Value)
						}
					}
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}
