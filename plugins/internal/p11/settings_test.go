package p11_test

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kmsd/internal/softhsmtest"
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

func TestSettingsThatAreWrong(t *testing.T) {
	b := newBench(t, "token-a", "twin", "twin")
	text := filepath.Join(t.TempDir(), "no-library.so")
	if err := os.WriteFile(text, []byte("not a library"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change map[string]string // "-" removes a setting
		want   []string
	}{
		{"an unknown setting", map[string]string{"slot": "1"},
			[]string{`unknown setting "slot"`, "known: module, softhsm_conf, token_label, token_serial"}},
		{"no way to choose the token", map[string]string{"token_label": "-"}, []string{"one of token_label and token_serial is required"}},
		{"all faults at once", map[string]string{"slot": "1", "token_label": "-", "module": "/nowhere.so", "softhsm_conf": "/nowhere.conf"},
			[]string{`unknown setting "slot"`, "one of token_label", "module: stat /nowhere.so", "softhsm_conf: stat /nowhere.conf"}},
		{"a module that is a directory", map[string]string{"module": t.TempDir()}, []string{"is not a file"}},
		{"a module that is no library", map[string]string{"module": text}, []string{text, "cannot be loaded"}},
		{"a label that no token can have", map[string]string{"token_label": strings.Repeat("x", 33)}, []string{"33 bytes long, a token label has at most 32"}},
		{"two tokens of one label", map[string]string{"token_label": "twin"}, []string{`there are 2 tokens with the label "twin"`, "choose one by token_serial: "}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			req := b.request()
			req.Settings = maps.Clone(b.settings)
			for name, value := range tc.change {
				if req.Settings[name] = value; value == "-" {
					delete(req.Settings, name)
				}
			}
			wantPermanent(t, req, tc.want...)
		})
	}
	// Its HSM may be off, so that it comes back by itself.
	for _, tc := range []struct {
		name, setting, value string
		want                 []string
	}{
		{"no such label", "token_label", "token-z", []string{`there is no token with the label "token-z"`, "present:", `"token-a" (serial `}},
		{"no such serial number", "token_serial", "0", []string{`the label "token-a" and the serial number "0"`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			req := b.request()
			req.Settings = maps.Clone(b.settings)
			req.Settings[tc.setting] = tc.value
			if e := refusal(t, req, tc.want...); e.Permanent || e.CKR != pluginproto.CKRTokenNotPresent {
				t.Errorf("%+v, want CKR_TOKEN_NOT_PRESENT, which may pass", e)
			}
		})
	}
	t.Run("no PIN", func(t *testing.T) {
		req := b.request()
		req.PIN = nil
		wantPermanent(t, req, "no PIN is given")
	})
	t.Run("a short domain secret", func(t *testing.T) {
		req := b.request()
		req.Domain = req.Domain[:16]
		wantPermanent(t, req, "16 bytes, at least 32")
	})
}

func wantPermanent(t *testing.T, req pluginproto.OpenRequest, texts ...string) {
	t.Helper()
	if e := refusal(t, req, texts...); !e.Permanent {
		t.Errorf("%v is no permanent failure", e)
	}
}

// refusal opens in vain, and returns the failure of the member, which has these texts.
func refusal(t *testing.T, req pluginproto.OpenRequest, texts ...string) *pluginproto.Error {
	t.Helper()
	d := p11.New(quirks(), p11.Options{})
	_, err := d.Open(t.Context(), req)
	var e *pluginproto.Error
	if !errors.As(err, &e) || e.Class != pluginproto.ClassMember {
		t.Fatalf("%v is no failure of the member", err)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%q does not say %q", err, text)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	return e
}

func TestATokenIsChosenBySerialNumber(t *testing.T) {
	b := newBench(t, "twin", "twin")
	serials := map[string]bool{}
	d := p11.New(quirks(), p11.Options{})
	_, err := d.Open(t.Context(), b.request())
	_ = d.Close()
	_, list, _ := strings.Cut(err.Error(), "choose one by token_serial: ")
	for _, serial := range strings.Split(list, ", ") {
		req := b.request()
		req.Settings = map[string]string{"token_serial": serial, "module": softhsmtest.Module(t), "softhsm_conf": b.store.Conf}
		d := p11.New(quirks(), p11.Options{})
		info, err := d.Open(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		serials[info.Serial] = true
		if len(info.Mechanisms) != int(pluginproto.HMAC) || !slices.IsSorted(info.Mechanisms) {
			t.Errorf("it offers %v, want the whole contract in order", info.Mechanisms)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if len(serials) != 2 {
		t.Errorf("opened %v", serials)
	}
}

func TestTheModuleIsFound(t *testing.T) {
	b := newBench(t)
	q := quirks()
	q.Modules = []string{"/nowhere.so", softhsmtest.Module(t)}
	delete(b.settings, "module")
	d := p11.New(q, p11.Options{})
	if _, err := d.Open(t.Context(), b.request()); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	wantPermanent(t, b.request(), "no PKCS#11 library at", "install it or set module")
}
