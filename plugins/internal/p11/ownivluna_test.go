package p11_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/lunasim"
)

// bare is an extension that adds nothing.
type bare struct{ p11.Extension }

func (bare) Prepare() error                                     { return nil }
func (bare) Describe(p11.Place, *pluginproto.TokenInfo) error   { return nil }
func (bare) Facts(p11.Place) ([]pluginproto.Fact, error)        { return nil, nil }
func (bare) UID(p11.Place, pkcs11.ObjectHandle) ([]byte, error) { return nil, nil }

// lunaQuirks are what a partition needs to be used, but not to be cloned to.
func lunaQuirks() p11.Quirks {
	return p11.Quirks{
		Driver:      "luna",
		ConfDirs:    map[string]p11.ConfDir{"chrystoki_conf": {Env: "ChrystokiConfigurationPath", File: "Chrystoki.conf"}},
		GCMTagFault: pluginproto.CKRGeneralError,
		Codes:       p11.Codes{0x8000001A: {Class: pluginproto.ClassCaller}}, // a Crypto User may make no keys
		Users:       map[string]uint{"": pkcs11.CKU_USER, "crypto-user": 0x80000001},
		Extend:      func(string) (p11.Extension, error) { return bare{}, nil },
		OnToken:     true,
	}
}

// notExtractable is what a key on a Luna has to be.
var notExtractable = map[uint]bool{pkcs11.CKA_EXTRACTABLE: false}

// Whichever way a Luna tells its IV, the driver finds the one that was used.
func TestLunaThatChoosesItsIVs(t *testing.T) {
	for _, c := range []struct {
		name     string
		switches map[string]string
		own      int // bytes of the token's own IV; 0: it takes the caller's
	}{
		{"it takes the caller's", map[string]string{"gcm_iv": "caller"}, 0},
		{"in FIPS mode", map[string]string{"hsm.12": "0"}, 16},
		{"it appends its own", map[string]string{"gcm_iv": "appended"}, 16},
		{"it refuses the caller's and appends its own", map[string]string{"gcm_iv": "refused"}, 16},
		{"it returns its own in the parameter", map[string]string{"gcm_iv": "params", "gcm_iv_len": "12"}, 12},
		{"it returns a long one in the parameter", map[string]string{"gcm_iv": "params", "gcm_iv_len": "16"}, 16},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := lunasim.New(t, lunasim.Options{Switches: c.switches})
			d := openLuna(t, p, "", p.PIN)
			defer d.Close()
			wantIVs(t, d, foreignKey(t, d, notExtractable), c.own)
			facts, err := d.Facts(t.Context())
			if err != nil || len(facts) != 1 || facts[0].Name != "GCM IV" || strings.Contains(facts[0].Value, "the token's own") != (c.own != 0) {
				t.Errorf("the facts are %v, %v", facts, err)
			}
			if err := roundTrip(t.Context(), d, foreignKey(t, d, notExtractable)); err != nil {
				t.Error(err)
			}
			if _, err := d.Do(t.Context(), pluginproto.Command{Op: pluginproto.OpProbe}); err != nil {
				t.Errorf("probing: %v", err)
			}
		})
	}
}

// What the HSM said first is what the operator has to know, not what came of it.
func TestTheFirstRefusalOfATrialIsTold(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{})
	p.Arm(lunasim.Fault{What: lunasim.Answer, Function: "C_Encrypt", Arg: 0x80009999, Times: lunasim.Forever})
	d := p11.New(lunaQuirks(), p11.Options{})
	defer d.Close()
	_, err := d.Open(t.Context(), pluginproto.OpenRequest{Settings: p.Settings(), PIN: []byte(p.PIN), Domain: make([]byte, 32)})
	if pluginproto.CKROf(err) != 0x80009999 || pluginproto.ClassOf(err) != pluginproto.ClassMember {
		t.Errorf("opening: %v", err)
	}
}

// Somebody who may make no key has no probe key to find it out with.
func TestIVsOfALunaForTheCryptoUser(t *testing.T) {
	for _, c := range []struct {
		mode string
		own  int
	}{{"caller", 0}, {"appended", 16}, {"refused", 16}, {"params", 16}} {
		t.Run(c.mode, func(t *testing.T) {
			p := lunasim.New(t, lunasim.Options{Switches: map[string]string{"gcm_iv": c.mode, "cu_session_objects": "no"}})
			officer := openLuna(t, p, "", p.PIN)
			id := foreignKey(t, officer, notExtractable)
			if err := officer.Close(); err != nil {
				t.Fatal(err)
			}
			d := openLuna(t, p, "crypto-user", p.CUPIN)
			defer d.Close()
			wantIVs(t, d, id, c.own)
		})
	}
}

func openLuna(t *testing.T, p *lunasim.Partition, user, pin string) *p11.Driver {
	t.Helper()
	d := p11.New(lunaQuirks(), p11.Options{})
	req := pluginproto.OpenRequest{Settings: p.Settings(), PIN: []byte(pin), Domain: bytes.Repeat([]byte{7}, 32)}
	if user != "" {
		req.Settings["user"] = user
	}
	if _, err := d.Open(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	return d
}

// wantIVs encrypts often, and wants each IV once and to be the token's own or the caller's.
func wantIVs(t *testing.T, d *p11.Driver, id pluginproto.KeyID, own int) {
	t.Helper()
	cmd := pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: id}
	for i := range 20 {
		cmd.Items = append(cmd.Items, pluginproto.Item{Input: fmt.Append(nil, "text ", i), IV: fmt.Appendf(nil, "an IV %6d", i), AAD: []byte("aad")})
	}
	res, err := d.Do(t.Context(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	open := pluginproto.Command{Op: pluginproto.OpDecrypt, Mech: pluginproto.AESGCM, Key: id}
	used := make(map[string]bool)
	for i, it := range res.Items {
		callers := bytes.Equal(it.IV, cmd.Items[i].IV)
		if used[string(it.IV)] || callers != (own == 0) || own != 0 && len(it.IV) != own {
			t.Errorf("item %d was encrypted with the IV %q", i, it.IV)
		}
		used[string(it.IV)] = true
		open.Items = append(open.Items, pluginproto.Item{Input: it.Output, IV: it.IV, AAD: []byte("aad")})
	}
	res, err = d.Do(t.Context(), open)
	if err != nil {
		t.Fatal(err)
	}
	for i, it := range res.Items {
		if it.Err != nil || string(it.Output) != fmt.Sprint("text ", i) {
			t.Errorf("item %d came back as %q, %v", i, it.Output, it.Err)
		}
	}
}
