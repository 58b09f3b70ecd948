package main

import (
	"context"
	"errors"
	"maps"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/luna/lunasim"
)

// What a driver says to a partition or a configuration that it cannot use. It tries a PIN at
// most once, and a partition that cannot be used loses no try at all.
func TestOpeningWhatCannotBeUsed(t *testing.T) {
	noAppID := []string{"CA_RandomizeApplicationID", "CA_SetApplicationID"}
	for _, tc := range []struct {
		name      string
		options   lunasim.Options
		settings  map[string]string // changed; "" takes one away
		pin       string
		ckr       uint
		says      string
		permanent bool
		tried     int // wrong PINs that the partition has counted
	}{
		{name: "no library", settings: map[string]string{"module": "/nowhere.so"}, says: "module: stat /nowhere.so", permanent: true},
		{name: "a file that is no library", settings: map[string]string{"module": "/etc/passwd"}, says: "/etc/passwd", permanent: true},
		{name: "no configuration", settings: map[string]string{"chrystoki_conf": "/nowhere/Chrystoki.conf"}, says: "chrystoki_conf: stat", permanent: true},
		{name: "a configuration of another name", settings: map[string]string{"chrystoki_conf": "/etc/passwd"}, says: "Chrystoki.conf", permanent: true},
		{name: "a library that finds no configuration", settings: map[string]string{"chrystoki_conf": ""}, ckr: pkcs11.CKR_GENERAL_ERROR,
			says: "is its configuration there and the right one (chrystoki_conf)"},
		{name: "a role that there is not", settings: map[string]string{"user": "root"}, says: "crypto-officer", permanent: true},
		{name: "an unknown setting", settings: map[string]string{"slot": "1"}, says: `unknown setting "slot"`, permanent: true},
		{name: "a label that there is not", settings: map[string]string{"token_serial": "", "token_label": "elsewhere"}, ckr: pluginproto.CKRTokenNotPresent, says: "elsewhere"},
		{name: "a wrong PIN", pin: "not-this-one", ckr: pluginproto.CKRPINIncorrect, says: "the PIN is wrong", permanent: true, tried: 1},
		{name: "a locked role", options: lunasim.Options{Switches: map[string]string{"login_limit": "0"}}, ckr: pluginproto.CKRPINLocked, says: "locked", permanent: true},
		{name: "a deactivated partition", options: lunasim.Options{Switches: map[string]string{"activated": "no"}}, ckr: own + 0x20, says: "activate it"},
		{name: "a deactivated partition that says it otherwise", options: lunasim.Options{Switches: map[string]string{"activated": "no", "deactivated_code": "0x101"}},
			ckr: 0x101, says: "if it is deactivated, activate it"},
		{name: "an HSM that was tampered with", options: lunasim.Options{Switches: map[string]string{"tampered": "yes"}}, ckr: own + 0x76, says: "tampered", permanent: true},
		{name: "a key-export partition", options: lunasim.Options{Kind: "export"}, says: "it is a key-export partition", permanent: true},
		{name: "an HA group of the client", options: lunasim.Options{Switches: map[string]string{"ha_slot": "yes", "ha_label": "payments"}},
			settings: map[string]string{"token_serial": "", "token_label": "payments"}, ckr: pluginproto.CKRTokenNotPresent, says: "name that one"},
		{name: "a client that hides its partitions", options: lunasim.Options{Switches: map[string]string{"ha_slot": "yes", "ha_only": "yes"}},
			ckr: pluginproto.CKRTokenNotPresent, says: `present: "ha-group" (an HA group that the client library makes up)`},
		{name: "a login that another program shares", options: lunasim.Options{Without: noAppID, Switches: map[string]string{"appid_shared": "yes"}},
			ckr: 0x100, says: "the PIN cannot be checked", permanent: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := lunasim.New(t, tc.options)
			settings := p.Settings()
			for name, value := range tc.settings {
				settings[name] = value
				if value == "" {
					delete(settings, name)
				}
			}
			pin := p.PIN
			if tc.pin != "" {
				pin = tc.pin
			}
			d := process(t, nil)
			_, err := d.Open(t.Context(), pluginproto.OpenRequest{Settings: settings, PIN: []byte(pin), Domain: newDomain()})
			e, ok := errors.AsType[*pluginproto.Error](err)
			if !ok || e.Class != pluginproto.ClassMember || e.CKR != tc.ckr || e.Permanent != tc.permanent || !strings.Contains(e.Error(), tc.says) {
				t.Errorf("%v (%+v)", err, e)
			}
			if ok && strings.Contains(e.Error(), pin) {
				t.Error("the message tells the PIN")
			}
			if tc.pin != "" { // the PIN is not tried again, whoever asks for what
				if _, err := d.List(t.Context()); err == nil {
					t.Error("a driver that is not logged in lists keys")
				}
			}
			if n := p.FailedLogins(); n != tc.tried {
				t.Errorf("%d wrong PINs were counted, want %d", n, tc.tried)
			}
		})
	}
}

func TestPhysicalPartitionIsFoundBesideItsHAGroup(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{Switches: map[string]string{"ha_slot": "yes"}})
	d := openDriver(t, p, newDomain(), nil)
	if d.info.Serial != p.Serial {
		t.Errorf("the serial number is %s, the partition's %s", d.info.Serial, p.Serial)
	}
}

func TestDriverHasALoginOfItsOwn(t *testing.T) {
	for _, without := range [][]string{nil, {"CA_RandomizeApplicationID"}} {
		p := lunasim.New(t, lunasim.Options{Without: without, Switches: map[string]string{"appid_shared": "yes"}})
		d := openDriver(t, p, newDomain(), nil)
		if _, err := d.Generate(t.Context(), pluginproto.KeySpec{ID: pluginproto.KeyID{1}, Type: pluginproto.AES256}); err != nil {
			t.Error(err)
		}
	}
}

// What happens to a partition while a driver serves from it.
func TestPartitionThatFailsWhileItServes(t *testing.T) {
	for _, tc := range []struct {
		name      string
		switches  map[string]string
		class     pluginproto.Class
		says      string
		permanent bool
		undo      map[string]string // after which a new driver serves again; nil: none does
	}{
		{"deactivated", map[string]string{"activated": "no"}, pluginproto.ClassMember, "activate it", false, map[string]string{"activated": "yes"}},
		{"deactivated, and the login is gone", map[string]string{"activated": "no", "deactivated_code": "0x101"}, pluginproto.ClassMember, "activate it", false,
			map[string]string{"activated": "yes"}},
		{"tampered with", map[string]string{"tampered": "yes"}, pluginproto.ClassMember, "tampered", true, nil},
		{"with another PIN", map[string]string{"pin": "another-one", "power": "1"}, pluginproto.ClassMember, "the PIN is wrong", true, map[string]string{"pin": lunasim.PIN}},
		{"with another firmware", map[string]string{"firmware": "7.8.4", "power": "1"}, pluginproto.ClassMember, "its firmware is 7.8.4 where it was 7.8.0", false,
			map[string]string{}},
		{"with another policy", map[string]string{"policy.42": "1", "power": "1"}, pluginproto.ClassMember, "cloning protocols or mechanisms are others", false,
			map[string]string{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := lunasim.New(t, lunasim.Options{})
			domain := newDomain()
			d := openDriver(t, p, domain, nil)
			id := pluginproto.KeyID{1}
			if _, err := d.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256}); err != nil {
				t.Fatal(err)
			}
			for name, value := range tc.switches {
				p.Set(name, value)
			}
			for range 3 {
				_, err := d.Do(t.Context(), encryption(id))
				e, ok := errors.AsType[*pluginproto.Error](err)
				if !ok || e.Class != tc.class || e.Permanent != tc.permanent || !strings.Contains(e.Error(), tc.says) {
					t.Errorf("%v (%+v)", err, e)
				}
			}
			want := 0
			if tc.switches["pin"] != "" {
				want = 1
			}
			if n := p.FailedLogins(); n != want {
				t.Errorf("%d wrong PINs were counted, want %d", n, want)
			}
			if _, err := d.Facts(t.Context()); err == nil {
				t.Error("facts of a partition that does not serve")
			}
			if tc.undo == nil {
				return
			}
			for name, value := range tc.undo {
				p.Set(name, value)
			}
			if _, err := openDriver(t, p, domain, nil).Do(t.Context(), encryption(id)); err != nil {
				t.Errorf("a new driver: %v", err)
			}
		})
	}
}

// An HSM that was without power for a moment has forgotten the login and keeps its activation.
func TestDriverComesBackAfterAPowerCycle(t *testing.T) {
	domain := newDomain()
	d, other := openDriver(t, lunasim.New(t, lunasim.Options{}), domain, nil), openDriver(t, lunasim.New(t, lunasim.Options{}), domain, nil)
	for n := range 3 {
		id := pluginproto.KeyID{byte(n + 1)}
		if _, err := d.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256}); err != nil {
			t.Fatal(err)
		}
		d.p.PowerCycle()
		if _, err := clone(t.Context(), d, other, cpv4, []pluginproto.KeyID{id}, unchanged); err != nil {
			t.Errorf("cloning from it: %v", err)
		}
		other.p.PowerCycle()
		if _, err := other.Facts(t.Context()); err != nil {
			t.Errorf("its facts: %v", err)
		}
		if _, err := other.Do(t.Context(), encryption(id)); err != nil {
			t.Errorf("using the copy: %v", err)
		}
	}
}

func encryption(id pluginproto.KeyID) pluginproto.Command {
	return pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: id, IV: make([]byte, pluginproto.GCMIVSize), Input: []byte("text")}
}

// Data that does not authenticate is the caller's fault, whatever the HSM answers to it.
func TestWrongTagIsTheCallersFault(t *testing.T) {
	for _, code := range []string{"0x40", "0x5"} {
		d, id := openDriver(t, lunasim.New(t, lunasim.Options{Switches: map[string]string{"gcm_tag_code": code}}), newDomain(), nil), pluginproto.KeyID{1}
		if _, err := d.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256}); err != nil {
			t.Fatal(err)
		}
		sealed, err := d.Do(t.Context(), encryption(id))
		if err != nil {
			t.Fatal(err)
		}
		sealed.Output[0] ^= 1
		_, err = d.Do(t.Context(), pluginproto.Command{Op: pluginproto.OpDecrypt, Mech: pluginproto.AESGCM, Key: id, IV: sealed.IV, Input: sealed.Output})
		if pluginproto.ClassOf(err) != pluginproto.ClassCaller || pluginproto.CKROf(err) != pluginproto.CKREncryptedDataInvalid {
			t.Errorf("answered %s: %v", code, err)
		}
	}
}

// A Crypto User uses keys, and does nothing else with them.
func TestCryptoUser(t *testing.T) {
	for _, sessionObjects := range []string{"yes", "no"} {
		t.Run("may make session objects: "+sessionObjects, func(t *testing.T) {
			p := lunasim.New(t, lunasim.Options{Switches: map[string]string{"cu_session_objects": sessionObjects}})
			officer, id := openDriver(t, p, newDomain(), nil), pluginproto.KeyID{1}
			if _, err := officer.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256}); err != nil {
				t.Fatal(err)
			}
			_ = officer.Close()
			settings := maps.Clone(p.Settings())
			settings["user"] = "crypto-user"
			user := process(t, nil)
			if _, err := user.Open(t.Context(), pluginproto.OpenRequest{Settings: settings, PIN: []byte(p.CUPIN), Domain: newDomain()}); err != nil {
				t.Fatal(err)
			}
			sealed, err := user.Do(t.Context(), encryption(id))
			if err != nil {
				t.Fatal(err)
			}
			opened, err := user.Do(t.Context(), pluginproto.Command{Op: pluginproto.OpDecrypt, Mech: pluginproto.AESGCM, Key: id, IV: sealed.IV, Input: sealed.Output})
			if err != nil || string(opened.Output) != "text" {
				t.Errorf("decrypting: %q, %v", opened.Output, err)
			}
			if _, err := user.Do(t.Context(), pluginproto.Command{Op: pluginproto.OpProbe}); err != nil {
				t.Errorf("a probe: %v", err)
			}
			_, make1 := user.Generate(t.Context(), pluginproto.KeySpec{ID: pluginproto.KeyID{2}, Type: pluginproto.AES256})
			for what, err := range map[string]error{"making a key": make1, "destroying one": user.Destroy(t.Context(), id)} {
				e, ok := errors.AsType[*pluginproto.Error](err)
				if !ok || e.Class != pluginproto.ClassCaller || e.CKR != ckrUserNotAuthorized || !strings.Contains(e.Msg, "Crypto User cannot") {
					t.Errorf("%s: %v (%+v)", what, err, e)
				}
			}
		})
	}
}

func TestFullPartition(t *testing.T) {
	full := lunasim.New(t, lunasim.Options{Switches: map[string]string{"limit_objects": "1"}})
	domain := newDomain()
	d, other := openDriver(t, full, domain, nil), openDriver(t, lunasim.New(t, lunasim.Options{}), domain, nil)
	id := pluginproto.KeyID{1}
	if _, err := d.Generate(t.Context(), pluginproto.KeySpec{ID: pluginproto.KeyID{9}, Type: pluginproto.AES256}); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256}); err != nil {
		t.Fatal(err)
	}
	_, making := d.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256})
	_, cloning := clone(t.Context(), other, d, cpv4, []pluginproto.KeyID{id}, unchanged)
	_, cloning3 := clone(t.Context(), other, d, cpv3, []pluginproto.KeyID{id}, unchanged)
	for what, err := range map[string]error{"making a key": making, "cloning one by CPv4": cloning, "cloning one by CPv3": cloning3} {
		e, ok := errors.AsType[*pluginproto.Error](err)
		if !ok || e.Class != pluginproto.ClassBusy || e.CKR != own+0x2C || !strings.Contains(e.Msg, "no room") {
			t.Errorf("%s: %v (%+v)", what, err, e)
		}
	}
	full.Set("limit_objects", "0")
	if _, err := clone(t.Context(), other, d, cpv4, []pluginproto.KeyID{id}, unchanged); err != nil {
		t.Errorf("when there is room: %v", err)
	}
}

func unchanged(blob []byte) []byte { return blob }

// Each reason for which two partitions cannot exchange keys has one sentence that says what to
// do about it.
func TestPartitionsThatDoNotFit(t *testing.T) {
	cpv1Options := lunasim.Options{Firmware: "7.4.0"}
	cpv3Options := lunasim.Options{Firmware: "7.7.1"}
	for _, tc := range []struct {
		name     string
		protocol string
		options  lunasim.Options   // of both
		change   map[string]string // at the target
		ckr      uint
		says     string
	}{
		{"another domain, CPv1", cpv1, cpv1Options, map[string]string{"domain": "blue"}, 0x20, "cloning domains"},
		{"another domain, CPv3", cpv3, cpv3Options, map[string]string{"domain": "blue"}, 0x20, "cloning domains"},
		{"another domain, CPv3, said otherwise", cpv3, cpv3Options, map[string]string{"domain": "blue", "domain_code": "0x40"}, 0x40, "cloning domains"},
		{"another domain, CPv4", cpv4, lunasim.Options{}, map[string]string{"domain": "blue"}, own + 0x108, "no cloning domain in common"},
		{"no domain", cpv4, lunasim.Options{}, map[string]string{"domain": "none"}, own + 0x09, "no cloning domain"},
		{"secret keys may not come", cpv3, cpv3Options, map[string]string{"policy.4": "0"}, own + 0x30, "a policy"},
		{"the HSM forbids cloning", cpv3, cpv3Options, map[string]string{"hsm.7": "0"}, own + 0x30, "a policy"},
		{"another protocol since", cpv4, lunasim.Options{}, map[string]string{"policy.42": "1"}, own + 0x111, "policy 42"},
		{"the clock is not set", cpv4, lunasim.Options{}, map[string]string{"clock": "no"}, own + 0x110, "set the HSM's clock"},
		{"no cipher suite in common", cpv4, lunasim.Options{Switches: map[string]string{"suites": "1"}}, map[string]string{"suites": "2"}, own + 0x10A, "cipher suite"},
		{"another SMK", sim, lunasim.Options{Kind: "sim"}, map[string]string{"smk": "2"}, own + 0x99, "SMK"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			domain := newDomain()
			from, to := openDriver(t, lunasim.New(t, tc.options), domain, nil), openDriver(t, lunasim.New(t, tc.options), domain, nil)
			for name, value := range tc.change {
				to.p.Set(name, value)
			}
			id := pluginproto.KeyID{1}
			if _, err := from.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256}); err != nil {
				t.Fatal(err)
			}
			_, err := clone(t.Context(), from, to, tc.protocol, []pluginproto.KeyID{id}, unchanged)
			e, ok := errors.AsType[*pluginproto.Error](err)
			if !ok || e.Class != pluginproto.ClassCaller || e.CKR != tc.ckr || !strings.Contains(e.Msg, tc.says) {
				t.Errorf("%v (%+v)", err, e)
			}
			if _, err := to.Inspect(t.Context(), id); pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
				t.Errorf("at the target: %v", err)
			}
		})
	}
}

func TestOpenEndsWithItsContext(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{})
	hang := p.Arm(lunasim.Fault{What: lunasim.Hang, Function: "C_Initialize"})
	d := process(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	opened := make(chan error, 1)
	go func() {
		_, err := d.Open(ctx, pluginproto.OpenRequest{Settings: p.Settings(), PIN: []byte(p.PIN), Domain: newDomain()})
		opened <- err
	}()
	for look := time.NewTicker(time.Millisecond); hang.Fired() == 0; <-look.C {
		// The limit of all tests ends it when the library is never called.
	}
	cancel()
	if err := <-opened; !errors.Is(err, context.Canceled) {
		t.Errorf("a library that hangs was opened: %v", err)
	}
	if hang.Fired() != 1 {
		t.Errorf("C_Initialize hung %d times", hang.Fired())
	}
	hang.Disarm()
}

// The library finds its configuration by the directory that the setting's file is in, and by
// nothing of the environment of kmsd.
func TestLibraryIsToldItsDirectory(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{})
	t.Setenv("ChrystokiConfigurationPath", filepath.Join(t.TempDir(), "nowhere"))
	if d := openDriver(t, p, newDomain(), nil); d.info.Label != p.Label {
		t.Errorf("opened %q", d.info.Label)
	}
}
