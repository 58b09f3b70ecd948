package config_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/config"
	"kmsd/kms/api"
)

// recruit is a description that fits the configuration "sound".
func (f fixture) recruit() api.MemberSpec {
	return api.MemberSpec{
		Name: "hsm-d", Driver: "fake", PIN: api.PINSource{File: filepath.Join(f.dir, "d.pin")},
		Settings: map[string]string{"module": "/usr/lib/x.so", "token_label": "hsm-d", "conf": filepath.Join(f.dir, "d.conf")},
	}
}

func (f fixture) load(t *testing.T) *config.Config {
	t.Helper()
	for name, text := range map[string]string{"d.pin": "1234-d\n", "d.conf": "# tokens\n"} {
		if err := os.WriteFile(filepath.Join(f.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := config.Load(f.file(t, sound), config.Options{Environ: []string{"KMSD_PIN_B=b"}})
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestEnlistTakesWhatTheConfigurationTrusts(t *testing.T) {
	f := newFixture(t)
	cfg := f.load(t)
	spec := f.recruit()
	spec.Standby = true
	m, err := cfg.Enlist("default", spec)
	if err != nil {
		t.Fatal(err)
	}
	if m.Name != "hsm-d" || m.Driver != "fake" || m.SHA256 != f.sum || !m.Standby || m.Source != "file:"+spec.PIN.File || m.Settings["token_label"] != "hsm-d" {
		t.Errorf("got %+v", m)
	}
	if pin, err := m.PIN(t.Context()); err != nil || string(pin) != "1234-d" {
		t.Errorf("its PIN is %q, %v", pin, err)
	}
	spec.SHA256 = strings.ToUpper(f.sum)
	if _, err := cfg.Enlist("default", spec); err != nil {
		t.Errorf("with the sum given: %v", err)
	}
	if _, err := cfg.Enlist("default", api.MemberSpec{Name: "hsm-a", Driver: "fake", PIN: spec.PIN, Settings: map[string]string{
		"module": "/usr/lib/x.so", "token_label": "hsm-a", "token_serial": "0012",
	}}); err != nil {
		t.Errorf("a member may be replaced by its own token: %v", err)
	}
	if got := cfg.Groups[0].Members[0].Settings["token_label"]; got != "hsm-a" || spec.Settings["token_label"] != "hsm-d" {
		t.Error("the arguments were written to")
	}
}

func TestEnlistRefuses(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(t *testing.T, f fixture, spec *api.MemberSpec)
		want   string
	}{
		{"a driver that no member uses", func(_ *testing.T, _ fixture, s *api.MemberSpec) { s.Driver = "open" },
			`driver: no member of the configuration uses "open"; put the member into kmsd.yaml and reload kmsd`},
		{"a driver that is a path", func(_ *testing.T, _ fixture, s *api.MemberSpec) { s.Driver = "../../bin/sh" },
			`driver: no member of the configuration uses "../../bin/sh"`},
		{"another program as the driver", func(_ *testing.T, _ fixture, s *api.MemberSpec) { s.SHA256 = strings.Repeat("0", 64) },
			"sha256: the configuration trusts another program as driver fake"},
		{"a driver that was changed since", func(t *testing.T, f fixture, _ *api.MemberSpec) {
			put(t, filepath.Join(f.dir, "drivers/kmsd-driver-fake"), "#!/bin/sh\nevil\n", 0o755)
		}, "is another program: its SHA-256 is"},
		{"a library that no member uses", func(_ *testing.T, f fixture, s *api.MemberSpec) { s.Settings["module"] = f.dir + "/evil.so" },
			"/evil.so; put the member into kmsd.yaml and reload kmsd"},
		{"a library with another spelling", func(_ *testing.T, _ fixture, s *api.MemberSpec) { s.Settings["module"] = "/usr/lib/../lib/x.so" },
			"settings.module: no member of the configuration uses /usr/lib/../lib/x.so"},
		{"a file in a setting that lies elsewhere", func(t *testing.T, _ fixture, s *api.MemberSpec) {
			s.Settings["conf"] = filepath.Join(t.TempDir(), "d.conf")
		}, "put the file beside those, or the member into kmsd.yaml and reload kmsd"},
		{"a file in a setting that no member has", func(_ *testing.T, f fixture, s *api.MemberSpec) {
			s.Settings["library"] = filepath.Join(f.dir, "d.conf")
		}, "settings.library: no member of the configuration has its library in"},
		{"a file in a setting that others may change", func(t *testing.T, f fixture, s *api.MemberSpec) {
			put(t, s.Settings["conf"], "", 0o666)
		}, "settings.conf: others may change"},
		{"a file in a setting that is a link", func(t *testing.T, f fixture, s *api.MemberSpec) {
			s.Settings["conf"] = filepath.Join(f.dir, "link.conf")
			if err := os.Symlink("/etc/hosts", s.Settings["conf"]); err != nil {
				t.Fatal(err)
			}
		}, "is neither a file nor a directory"},
		{"no PIN", func(_ *testing.T, _ fixture, s *api.MemberSpec) { s.PIN.File = "" }, "pin.file: missing"},
		{"a relative path of the PIN", func(_ *testing.T, _ fixture, s *api.MemberSpec) { s.PIN.File = "d.pin" }, "is not a clean absolute path"},
		{"a path of the PIN with detours", func(_ *testing.T, f fixture, s *api.MemberSpec) { s.PIN.File = f.dir + "/drivers/../d.pin" }, "is not a clean absolute path"},
		{"a PIN that others can read", func(_ *testing.T, f fixture, s *api.MemberSpec) { s.PIN.File = filepath.Join(f.dir, "world.pin") }, "lets others at"},
		{"a PIN in a pipe", func(_ *testing.T, f fixture, s *api.MemberSpec) { s.PIN.File = filepath.Join(f.dir, "pipe") }, "is not a regular file"},
		{"an empty PIN", func(_ *testing.T, f fixture, s *api.MemberSpec) { s.PIN.File = filepath.Join(f.dir, "empty") }, "the secret is empty"},
		{"a PIN that lies elsewhere", func(t *testing.T, _ fixture, s *api.MemberSpec) {
			s.PIN.File = filepath.Join(t.TempDir(), "pin")
			put(t, s.PIN.File, "1234", 0o600)
		}, "no member of the configuration has its PIN in"},
		{"the domain secret as a PIN", func(_ *testing.T, f fixture, s *api.MemberSpec) { s.PIN.File = filepath.Join(f.dir, "domain") }, "it is the domain secret of group default"},
		{"the key of the server as a PIN", func(_ *testing.T, f fixture, s *api.MemberSpec) { s.PIN.File = filepath.Join(f.dir, "server.key") }, "it is the key of the TLS certificate"},
		{"a name that is none", func(_ *testing.T, _ fixture, s *api.MemberSpec) { s.Name = "../d" }, `name: "../d" is not a name`},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFixture(t)
			cfg := f.load(t)
			spec := f.recruit()
			c.change(t, f, &spec)
			_, err := cfg.Enlist("default", spec)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v\nwant %q in it", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), strings.Repeat("d", 44)) {
				t.Error("the error holds the secret")
			}
		})
	}
}

func put(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// How often recovery tries is one number of an operator's, and two of package kms.
func TestRetries(t *testing.T) {
	for text, want := range map[string]struct {
		manual  bool
		retries int
	}{
		"{}":                          {false, -1},
		"{retries: -1}":               {false, -1},
		"{retries: 5}":                {false, 5},
		"{retries: 0}":                {true, 0},
		"{mode: manual}":              {true, -1},
		"{mode: auto, retries: 0}":    {true, 0},
		"{mode: manual, retries: 12}": {true, 12},
	} {
		t.Run(text, func(t *testing.T) {
			f := newFixture(t)
			path := f.file(t, strings.Replace(sound, "{mode: manual, interval: 90s, retries: 3}", text, 1))
			cfg, err := config.Load(path, config.Options{Environ: []string{"KMSD_PIN_B=b"}})
			if err != nil {
				t.Fatal(err)
			}
			if r := cfg.KMS(nil, nil).Groups[0].Recovery; r.Manual != want.manual || r.Retries != want.retries {
				t.Errorf("got %+v, want %+v", r, want)
			}
		})
	}
}
