package p11_test

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/internal/faultlib"
	"kmsd/internal/softhsmtest"
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// opened opens a driver with some quirks until the test ends.
func (b *bench) opened(t testing.TB, q p11.Quirks) (*p11.Driver, pluginproto.TokenInfo) {
	t.Helper()
	d, info, err := b.tryOpen(t, q)
	if err != nil {
		t.Fatalf("opening: %v", err)
	}
	return d, info
}

func (b *bench) tryOpen(t testing.TB, q p11.Quirks) (*p11.Driver, pluginproto.TokenInfo, error) {
	t.Helper()
	d := p11.New(q, p11.Options{})
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	info, err := d.Open(t.Context(), b.request())
	return d, info, err
}

func TestATokenSaysWhatItsExtensionKnows(t *testing.T) {
	w := newWorld()
	d, info := newBench(t).opened(t, w.quirks())
	if info.Firmware != "7.8.4" || len(info.Cloning) != 3 || info.Cloning[1].Name != "batch" || info.Model != "SoftHSM v2" || len(info.DomainCheck) != 8 {
		t.Errorf("%+v", info)
	}
	facts, err := d.Facts(t.Context())
	if err != nil || len(facts) == 0 || facts[0].Name != "slot" || facts[0].Value != "true" {
		t.Errorf("facts: %v, %v", facts, err)
	}
	if err := d.CloseAllSessions(); err != nil {
		t.Fatal(err)
	}
	if facts, err := d.Facts(t.Context()); err != nil || len(facts) == 0 {
		t.Errorf("facts after the sessions were lost: %v, %v", facts, err)
	}
	if w.prepared != 2 {
		t.Errorf("the library was prepared %d times for two connections", w.prepared)
	}
}

func TestAnExtensionIsPreparedBeforeAnySession(t *testing.T) {
	w := newWorld()
	q := w.quirks()
	extend := q.Extend
	open := 0
	q.Extend = func(module string) (p11.Extension, error) {
		x, err := extend(module)
		lib := x.(*fake).lib
		w.preparing = func() {
			for h := range pkcs11.SessionHandle(64) { // the first numbers that SoftHSM gives out
				if _, err := lib.GetSessionInfo(h); err == nil {
					open++
				}
			}
		}
		return x, err
	}
	d, _ := newBench(t).opened(t, q)
	if open != 0 {
		t.Errorf("%d sessions were there before", open)
	}
	id := generate(t, d, pluginproto.ECP256).ID
	if _, err := d.Do(t.Context(), pluginproto.Command{Op: pluginproto.OpSign, Mech: pluginproto.ECDSA, Hash: pluginproto.SHA256, Key: id, Input: make([]byte, 32)}); err != nil {
		t.Errorf("signing, which takes sessions of crypto11's: %v", err)
	}
}

// What an extension finds wrong is wrong with the token, and stays so when it was for good.
func TestAnExtensionThatRefusesTheToken(t *testing.T) {
	forGood := &pluginproto.Error{Class: pluginproto.ClassMember, Permanent: true, Op: "looking at the policies", Msg: "it clones nothing"}
	for name, tc := range map[string]struct {
		ill       func(*world)
		permanent bool
		want      string
	}{
		"preparing fails":              {func(w *world) { w.prepare = pkcs11.Error(pkcs11.CKR_DEVICE_ERROR) }, false, "preparing the library: CKR_DEVICE_ERROR"},
		"the token is not the right":   {func(w *world) { w.describe = forGood }, true, "it clones nothing"},
		"the token does not answer":    {func(w *world) { w.describe = pkcs11.Error(pkcs11.CKR_DEVICE_REMOVED) }, false, "asking the token about itself: CKR_DEVICE_REMOVED"},
		"the library lacks everything": {func(w *world) { w.extend = forGood }, true, "it clones nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			b, w := newBench(t), newWorld()
			d, _ := b.opened(t, w.quirks())
			w.do(func() { tc.ill(w) })
			if err := d.CloseAllSessions(); err != nil {
				t.Fatal(err)
			}
			_, lost := d.List(t.Context())
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			_, _, opening := b.tryOpen(t, w.quirks())
			for when, err := range map[string]error{"opening": opening, "connecting again": lost} {
				e, ok := errors.AsType[*pluginproto.Error](err)
				if !ok || e.Class != pluginproto.ClassMember || e.Permanent != tc.permanent {
					t.Errorf("%s: %v (%+v)", when, err, e)
				}
				if when == "opening" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
					t.Errorf("%q does not say %q", err, tc.want)
				}
			}
		})
	}
}

const limited = 0x80000001 // the second user that the sealed library knows

func userQuirks() p11.Quirks {
	q := newWorld().quirks()
	q.Users = map[string]uint{"": pkcs11.CKU_USER, "officer": pkcs11.CKU_USER, "clerk": limited}
	q.Codes = p11.Codes{0x8000001A: {Class: pluginproto.ClassCaller, Hint: "a clerk makes no keys"}}
	return q
}

// One who may make no keys uses those that are there, and needs no probe key.
func TestAUserWhoMayMakeNoKeys(t *testing.T) {
	b := newBench(t)
	b.settings["module"] = sealedLibrary(t, softhsmtest.Module(t))
	d, _ := b.opened(t, userQuirks())
	made := generate(t, d, pluginproto.AES256)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	b.settings["user"] = "clerk"
	d, info := b.opened(t, userQuirks())
	if !slices.ContainsFunc(info.Facts, func(f pluginproto.Fact) bool { return f.Warning && strings.HasPrefix(f.Value, "clerk: ") }) {
		t.Errorf("nobody is told that it is a clerk's: %v", info.Facts)
	}
	for range 2 {
		if _, err := d.Do(t.Context(), pluginproto.Command{Op: pluginproto.OpProbe}); err != nil {
			t.Errorf("probing: %v", err)
		}
		if err := roundTrip(t.Context(), d, made.ID); err != nil {
			t.Error(err)
		}
		if all, err := d.List(t.Context()); err != nil || len(all) != 1 {
			t.Errorf("listing: %v, %v", all, err)
		}
		_, err := d.Generate(t.Context(), pluginproto.KeySpec{ID: newID(), Type: pluginproto.AES256})
		if pluginproto.ClassOf(err) != pluginproto.ClassCaller || !strings.Contains(err.Error(), "CKR_USER_NOT_AUTHORIZED: a clerk makes no keys") {
			t.Errorf("generating: %v", err)
		}
		if err := d.CloseAllSessions(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSettingsOfAVendor(t *testing.T) {
	b := newBench(t)
	right, wrong := filepath.Join(t.TempDir(), "Vendor.conf"), filepath.Join(t.TempDir(), "vendor.conf.bak")
	for _, path := range []string{right, wrong} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	q := userQuirks()
	q.ConfDirs = map[string]p11.ConfDir{"vendor_conf": {Env: "KMSD_TEST_VENDOR_DIR", File: "Vendor.conf"}}
	t.Setenv("KMSD_TEST_VENDOR_DIR", "")
	for _, tc := range []struct {
		name   string
		change map[string]string
		want   []string
	}{
		{"a user that there is not", map[string]string{"user": "boss"}, []string{`user: there is no user "boss" (known: clerk, officer)`}},
		{"a user without a name", map[string]string{"user": ""}, []string{`there is no user ""`}},
		{"a file with another name", map[string]string{"vendor_conf": wrong}, []string{"is not named Vendor.conf"}},
		{"all faults at once", map[string]string{"user": "boss", "vendor_conf": "/nowhere/Vendor.conf", "slot": "1"},
			[]string{"no user", "stat /nowhere/Vendor.conf", `unknown setting "slot" (known: cloning, module, softhsm_conf, token_label, token_serial, user, vendor_conf)`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			good := b.settings
			defer func() { b.settings = good }()
			b.settings = maps.Clone(good)
			maps.Copy(b.settings, tc.change)
			_, _, err := b.tryOpen(t, q)
			for _, want := range tc.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%v does not say %q", err, want)
				}
			}
		})
	}
	b.settings["vendor_conf"], b.settings["user"] = right, "officer"
	b.opened(t, q)
	if got := os.Getenv("KMSD_TEST_VENDOR_DIR"); got != filepath.Dir(right) {
		t.Errorf("the library is told to look in %q", got)
	}
}

func TestASettingChoosesAmongTheProtocols(t *testing.T) {
	b := newBench(t)
	for _, tc := range []struct {
		name, cloning, want, fault string
	}{
		{"those that are named, in their order", "alone, relay, unheard-of", "alone relay", ""},
		{"one", "relay", "relay", ""},
		{"none that the token has", "unheard-of", "", "cloning allows unheard-of, and the token has "},
		{"none at all", " , ", "", "cloning names no protocol"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b.settings["cloning"] = tc.cloning
			_, info, err := b.tryOpen(t, newWorld().quirks())
			if tc.fault != "" {
				if err == nil || !strings.Contains(err.Error(), tc.fault) {
					t.Errorf("%v does not say %q", err, tc.fault)
				}
				return
			}
			var names []string
			for _, p := range info.Cloning {
				names = append(names, p.Name)
			}
			if err != nil || strings.Join(names, " ") != tc.want {
				t.Errorf("%v, %v, want %s", names, err, tc.want)
			}
		})
	}
}

func TestASlotThatStandsForSeveralTokens(t *testing.T) {
	b := newBench(t)
	_, info := b.opened(t, quirks())
	q := quirks()
	q.VirtualModels = []string{"SoftHSM v2"}
	for _, by := range []string{"label", "serial"} {
		if by == "serial" {
			b.settings["token_serial"] = info.Serial
		}
		_, _, err := b.tryOpen(t, q)
		e, ok := errors.AsType[*pluginproto.Error](err)
		if !ok || e.Class != pluginproto.ClassMember || !strings.Contains(err.Error(), "HA group") || !strings.Contains(err.Error(), "name that one") {
			t.Fatalf("by %s: %v", by, err)
		}
		// A token that is off may have the label of its group.
		if e.Permanent != (by == "serial") {
			t.Errorf("by %s: permanent %v", by, e.Permanent)
		}
	}
}

func TestAVendorsCodes(t *testing.T) {
	codes := p11.Codes{
		0x80000076:              {Class: pluginproto.ClassMember, Permanent: true, Hint: "untamper it"},
		0x80000041:              {Class: pluginproto.ClassBusy},
		pkcs11.CKR_DATA_INVALID: {Class: pluginproto.ClassUnknown, Hint: "here it may mean anything"},
	}
	for _, tc := range []struct {
		ckr  uint
		want pluginproto.Error
	}{
		{0x80000076, pluginproto.Error{Class: pluginproto.ClassMember, Permanent: true, Msg: "untamper it"}},
		{0x80000041, pluginproto.Error{Class: pluginproto.ClassBusy}},
		{0x80000042, pluginproto.Error{}},
		{pkcs11.CKR_DATA_INVALID, pluginproto.Error{Msg: "here it may mean anything"}},
		{pkcs11.CKR_DATA_LEN_RANGE, pluginproto.Error{Class: pluginproto.ClassCaller}},
	} {
		tc.want.CKR, tc.want.Op = tc.ckr, "testing"
		if e, _ := errors.AsType[*pluginproto.Error](p11.ClassifyBy(codes, tc.ckr)); *e != tc.want {
			t.Errorf("%+v, want %+v", *e, tc.want)
		}
	}
}

// A vendor's value may mean that the session is lost, and is made good as the standard's is.
func TestAVendorsWordForALostSession(t *testing.T) {
	const gone = 0x8000001F
	b, lib := faultyBench(t)
	for _, known := range []bool{true, false} {
		q := quirks()
		if known {
			q.Codes = p11.Codes{gone: {Class: pluginproto.ClassMember, Gone: true}}
		}
		d, _ := b.opened(t, q)
		id := generate(t, d, pluginproto.AES256).ID
		lib.Arm(t, 0, faultlib.Fault{What: faultlib.Answer, Function: "C_EncryptInit", Arg: gone})
		if err := roundTrip(t.Context(), d, id); (err == nil) != known {
			t.Errorf("known %v: %v", known, err)
		}
		lib.Disarm(t, 0)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
