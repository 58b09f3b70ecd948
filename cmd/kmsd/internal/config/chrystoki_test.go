package config_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/config"
)

// lunaSite is a directory with a configuration whose first member is a Luna partition,
// with more in its settings.
func lunaSite(t *testing.T, settings string) (f fixture, path string) {
	t.Helper()
	f = newFixture(t)
	if err := os.Link(filepath.Join(f.dir, "drivers/kmsd-driver-fake"), filepath.Join(f.dir, "drivers/kmsd-driver-luna")); err != nil {
		t.Fatal(err)
	}
	f.write(t, "haonly/Chrystoki.conf", "HAConfiguration = {\n   HAOnly = 1;\n}\n")
	f.write(t, "groups/Chrystoki.conf", "VirtualToken = {\n   VirtualToken00Label = payments;\n   VirtualToken00SN = 1100;\n   VirtualToken00Members = 100,101;\n}\n")
	f.write(t, "plain/Chrystoki.conf", "Chrystoki2 = {\n   LibUNIX64 = /x.so;\n}\n")
	f.write(t, "broken/Chrystoki.conf", "Chrystoki2 = {\n")
	text := strings.Replace(sound, "driver: fake", "driver: luna", 1)
	return f, f.file(t, strings.Replace(text, "{module: /usr/lib/x.so, token_label: hsm-a, token_serial: 0012, conf: ./a.conf}", "{"+settings+"}", 1))
}

func (f fixture) write(t *testing.T, name, text string) {
	t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestWhatALunaClientIsToldIsLookedAt(t *testing.T) {
	const at = "$DIR/kmsd.yaml:20: groups[0].members[0].settings"
	for _, c := range []struct {
		name, settings string
		server         bool   // it is loaded by a server, not by a check
		client         string // the file of members that name none, in the fixture
		warning, fault string // how the only one begins, "" when there is none
	}{
		{name: "a client without HA", settings: "token_serial: 100, chrystoki_conf: ./plain/Chrystoki.conf"},
		{name: "no client at all", settings: "token_serial: 100"},
		{name: "HAOnly", settings: "token_serial: 100, chrystoki_conf: ./haonly/Chrystoki.conf",
			warning: at + ".chrystoki_conf: member hsm-a: $DIR/haonly/Chrystoki.conf:2: HAConfiguration.HAOnly hides the physical slots"},
		{name: "HAOnly, for a server", settings: "token_serial: 100, chrystoki_conf: ./haonly/Chrystoki.conf", server: true,
			warning: at + ".chrystoki_conf: member hsm-a: $DIR/haonly/Chrystoki.conf:2: "},
		{name: "HAOnly of the client's own file", settings: "token_serial: 100", client: "haonly/Chrystoki.conf",
			warning: at + ".chrystoki_conf: member hsm-a: $DIR/haonly/Chrystoki.conf:2: HAConfiguration.HAOnly hides"},
		{name: "a partition of a Luna HA group", settings: "token_serial: 101, chrystoki_conf: ./groups/Chrystoki.conf",
			warning: at + `.chrystoki_conf: member hsm-a: $DIR/groups/Chrystoki.conf:4: partition 101 is in the Luna HA group "payments"`},
		{name: "a file that is none", settings: "token_serial: 100, chrystoki_conf: ./broken/Chrystoki.conf",
			warning: at + ".chrystoki_conf: member hsm-a: $DIR/broken/Chrystoki.conf:2: section Chrystoki2, of line 1, has no }; so nobody has looked"},
		{name: "the serial number of a virtual slot", settings: "token_serial: 1100, chrystoki_conf: ./groups/Chrystoki.conf", server: true,
			fault: at + `.token_serial: $DIR/groups/Chrystoki.conf:3: that is the virtual slot of the Luna HA group "payments"`},
		{name: "the label of a virtual slot", settings: "token_label: payments", client: "groups/Chrystoki.conf",
			fault: at + ".token_label: $DIR/groups/Chrystoki.conf:2: that is the virtual slot"},
		{name: "a file that is not there", settings: "token_serial: 100, chrystoki_conf: ./none/Chrystoki.conf",
			fault: at + ".chrystoki_conf: $DIR/none/Chrystoki.conf: no such file or directory"},
		{name: "a file that is not there, for a server", settings: "token_serial: 100, chrystoki_conf: ./none/Chrystoki.conf", server: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, path := lunaSite(t, c.settings)
			client := filepath.Join(f.dir, "none")
			if c.client != "" {
				client = filepath.Join(f.dir, c.client)
			}
			cfg, err := config.Inspect(path, config.Options{Environ: []string{"KMSD_PIN_B=b"}, Modules: !c.server, ClientConf: client})
			if cfg == nil {
				t.Fatal(err)
			}
			is := func(what, got, want string) {
				t.Helper()
				got = strings.ReplaceAll(got, f.dir, "$DIR")
				if (got == "") != (want == "") || !strings.HasPrefix(got, want) || strings.Contains(got, "\n") {
					t.Errorf("%s: got\n%s\nwant\n%s", what, got, want)
				}
			}
			is("warnings", strings.Join(cfg.Warnings, "\n"), c.warning)
			faults := ""
			if err != nil {
				faults = strings.TrimPrefix(err.Error(), "the configuration has a fault:\n  ")
			}
			is("faults", faults, c.fault)
		})
	}
}

// Whoever can replace the library, or what tells it where its HSM is, gets the PIN.
func TestFilesThatAnybodyCouldReplaceAreWarnedOf(t *testing.T) {
	const at = "$DIR/kmsd.yaml:20: groups[0].members[0].settings.chrystoki_conf: member hsm-a: "
	for _, c := range []struct {
		name      string
		dir, file os.FileMode
		warning   string
	}{
		{"a file of its owner's", 0o755, 0o644, ""},
		{"a file that a group may write", 0o775, 0o664, ""},
		{"a file that anybody may write", 0o755, 0o666, at + "mode 0666 lets anybody change $DIR/plain/Chrystoki.conf, and with it what the driver gives the PIN to: chmod o-w $DIR/plain/Chrystoki.conf"},
		{"a directory that anybody may write", 0o777, 0o644, at + "mode 0777 of its directory lets anybody replace $DIR/plain/Chrystoki.conf, and with it what the driver gives the PIN to: chmod o-w $DIR/plain"},
		{"a directory in which everybody has files of his own", 0o777 | os.ModeSticky, 0o644, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, path := lunaSite(t, "token_serial: 100, chrystoki_conf: ./plain/Chrystoki.conf")
			for name, mode := range map[string]os.FileMode{"plain/Chrystoki.conf": c.file, "plain": c.dir} {
				if err := os.Chmod(filepath.Join(f.dir, name), mode); err != nil {
					t.Fatal(err)
				}
			}
			cfg, err := config.Load(path, config.Options{Environ: []string{"KMSD_PIN_B=b"}})
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.ReplaceAll(strings.Join(cfg.Warnings, "\n"), f.dir, "$DIR"); got != c.warning {
				t.Errorf("got\n%s\nwant\n%s", got, c.warning)
			}
		})
	}
}

func TestOtherDriversHaveNoChrystokiConf(t *testing.T) {
	f, _ := lunaSite(t, "")
	cfg, err := config.Load(f.file(t, sound), config.Options{Environ: []string{"KMSD_PIN_B=b"}, ClientConf: filepath.Join(f.dir, "haonly/Chrystoki.conf")})
	if err != nil || len(cfg.Warnings) > 0 {
		t.Errorf("got %v, %q", err, cfg.Warnings)
	}
}

func TestAMemberWithAChrystokiConfOfItsOwnHasATokenOfItsOwn(t *testing.T) {
	const other = "      - {name: hsm-d, driver: luna, sha256: $SUM, pin: {file: a.pin}, settings: {token_label: one, chrystoki_conf: ./CONF/Chrystoki.conf}}\nauth:"
	for conf, want := range map[string]string{"plain": "the same token as member hsm-a", "broken": ""} {
		f, path := lunaSite(t, "token_label: one, chrystoki_conf: ./plain/Chrystoki.conf")
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		_, err = config.Load(f.file(t, strings.Replace(string(text), "auth:", strings.Replace(other, "CONF", conf, 1), 1)), config.Options{Environ: []string{"KMSD_PIN_B=b"}})
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("with the file in %s: got %v, want %q", conf, err, want)
		}
	}
}

func TestEnlistRefusesAVirtualSlot(t *testing.T) {
	f, path := lunaSite(t, "token_serial: 100, chrystoki_conf: ./plain/Chrystoki.conf, module: /usr/lib/x.so")
	f.write(t, "plain/groups.conf", "VirtualToken = { VirtualToken00SN = 1100; }")
	for _, name := range []string{"a.pin", "d.pin"} {
		if err := os.WriteFile(filepath.Join(f.dir, name), []byte("1234\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := config.Load(path, config.Options{Environ: []string{"KMSD_PIN_B=b"}})
	if err != nil {
		t.Fatal(err)
	}
	spec := f.recruit()
	spec.Driver = "luna"
	spec.Settings = map[string]string{"module": "/usr/lib/x.so", "token_serial": "1100", "chrystoki_conf": filepath.Join(f.dir, "plain/groups.conf")}
	if _, err := cfg.Enlist("default", spec); err == nil || !strings.Contains(err.Error(), "settings.token_serial: "+f.dir+"/plain/groups.conf:1: that is the virtual slot") {
		t.Errorf("got %v, want a refusal of the virtual slot", err)
	}
	spec.Settings["token_serial"] = "100"
	if _, err := cfg.Enlist("default", spec); err != nil {
		t.Errorf("a partition is refused: %v", err)
	}
}
