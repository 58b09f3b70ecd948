package drivertest

import (
	"bytes"
	"slices"
	"testing"

	"kmsd/pluginproto"
)

func testOpen(t *testing.T, cfg Config) {
	token := cfg.NewToken(t)
	domain := newDomain()
	var first pluginproto.TokenInfo
	var made pluginproto.Object

	t.Run("the token is described", func(t *testing.T) {
		d, info := open(t, token, domain)
		first = info
		if info.Label == "" || info.Serial == "" || info.Driver == "" {
			t.Errorf("label, serial or driver is missing: %+v", info)
		}
		if len(info.DomainCheck) == 0 {
			t.Error("no check value of the domain key")
		}
		if len(info.Mechanisms) == 0 || !slices.IsSorted(info.Mechanisms) || len(slices.Compact(slices.Clone(info.Mechanisms))) != len(info.Mechanisms) {
			t.Errorf("mechanisms %v, want each that the token offers once, in order", info.Mechanisms)
		}
		var err error
		made, err = d.Generate(limit(t), pluginproto.KeySpec{ID: newID(), Type: cfg.Types[0], Label: "kept"})
		if err != nil {
			t.Fatalf("generating a key: %v", err)
		}
	})
	t.Run("another driver finds the same token and its keys", func(t *testing.T) {
		d, info := open(t, token, domain)
		if info.Serial != first.Serial {
			t.Errorf("serial %q, was %q", info.Serial, first.Serial)
		}
		if !bytes.Equal(info.DomainCheck, first.DomainCheck) {
			t.Error("the same domain secret has given another domain key")
		}
		o, err := d.Inspect(limit(t), made.ID)
		if err != nil {
			t.Fatalf("inspecting a key made by the driver before: %v", err)
		}
		sameObject(t, "a key made by the driver before", o, made)
	})
	t.Run("another domain secret has another check value", func(t *testing.T) {
		_, info := open(t, cfg.NewToken(t), newDomain())
		if bytes.Equal(info.DomainCheck, first.DomainCheck) {
			t.Error("two domains have one check value")
		}
	})
	t.Run("a wrong PIN is a permanent fault of the member", func(t *testing.T) {
		d := token.Start(t)
		req := request(token, domain)
		req.PIN = append(req.PIN, 'x')
		_, err := d.Open(limit(t), req)
		wantCKR(t, err, pluginproto.ClassMember, pluginproto.CKRPINIncorrect)
		wantPermanent(t, err)
		if bytes.Contains([]byte(err.Error()), req.PIN) {
			t.Error("the error tells the PIN")
		}
		_ = d.Close() // of a driver that never opened; only that it returns matters
	})
	t.Run("an unknown setting is a fault", func(t *testing.T) {
		d := token.Start(t)
		req := request(token, domain)
		req.Settings = map[string]string{"no_such_setting": "1"}
		for name, value := range token.Settings {
			req.Settings[name] = value
		}
		if _, err := d.Open(limit(t), req); err == nil {
			t.Error("it was accepted")
		}
		_ = d.Close() // as above
	})
}

func wantPermanent(t *testing.T, err error) {
	t.Helper()
	if e, ok := asError(err); !ok || !e.Permanent {
		t.Errorf("error %v is not marked permanent", err)
	}
}
