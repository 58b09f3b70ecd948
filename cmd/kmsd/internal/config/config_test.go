package config_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/txtar"
	"github.com/spf13/pflag"

	"kmsd/cmd/kmsd/internal/config"
)

// fixture is a directory with everything a configuration may name.
type fixture struct {
	dir, sum string
}

func newFixture(t *testing.T) fixture {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, mode os.FileMode, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil { // whatever the umask is
			t.Fatal(err)
		}
		return path
	}
	if err := os.Mkdir(filepath.Join(dir, "drivers"), 0o755); err != nil {
		t.Fatal(err)
	}
	fake := write("drivers/kmsd-driver-fake", 0o755, "#!/bin/sh\n")
	write("drivers/kmsd-driver-open", 0o777, "#!/bin/sh\n")
	write("a.pin", 0o600, "1234-a\n")
	write("world.pin", 0o644, "1234\n")
	write("empty", 0o600, "\n")
	write("domain", 0o600, strings.Repeat("d", 44)+"\n")
	write("short", 0o600, "too short\n")
	write("tokens.yaml", 0o600, "tokens: []\n")
	write("policies.yaml", 0o644, "policies: {}\n")
	cert, key := certificate(t)
	other, _ := certificate(t)
	write("server.pem", 0o644, cert)
	write("other.pem", 0o644, other)
	write("server.key", 0o600, key)
	write("open.key", 0o640, key)
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	sum, err := config.Sum(fake)
	if err != nil {
		t.Fatal(err)
	}
	return fixture{dir: dir, sum: sum}
}

func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	return certificateFor(t, 90*24*time.Hour)
}

func certificateFor(t *testing.T, life time.Duration) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(life)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder}))
}

// file writes a configuration and returns its path.
func (f fixture) file(t *testing.T, text string) string {
	t.Helper()
	text = strings.NewReplacer("$DIR", f.dir, "$SUM", f.sum).Replace(text)
	path := filepath.Join(f.dir, "kmsd.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const sound = `
listen: ["https://127.0.0.1:8420", "unix:///run/kmsd/kmsd.sock"]
tls: {cert: server.pem, key: server.key, client_ca: other.pem}
catalog: {bolt: {path: catalog.db}}
driver_dir: drivers
groups:
  - name: default
    domain: {file: domain}
    min_copies: 2
    balance: count
    command_timeout: 20s
    probe_interval: 2s
    hedge: false
    recovery: {mode: manual, interval: 90s, retries: 3}
    members:
      - name: hsm-a
        driver: fake
        sha256: $SUM
        pin: {file: a.pin}
        settings: {module: /usr/lib/x.so, token_label: hsm-a, token_serial: 0012, conf: ./a.conf}
      - {name: hsm-b, standby: true, driver: fake, sha256: $SUM, pin: {env: KMSD_PIN_B}, settings: {token_label: hsm-b}}
      - {name: hsm-c, driver: fake, sha256: $SUM, pin: {exec: [printf, pin-of-c]}, settings: {token_label: hsm-c}}
auth: {tokens: tokens.yaml, policies: policies.yaml}
audit: {file: audit.jsonl}
`

func TestLoadReadsEverything(t *testing.T) {
	f := newFixture(t)
	cfg, err := config.Load(f.file(t, sound), config.Options{Environ: []string{"KMSD_PIN_B=pin-of-b", "KMSD_ADDR=client", "KMSD_TYPO=x"}})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := cfg.Catalog.Bolt.Path, filepath.Join(f.dir, "catalog.db"); got != want {
		t.Errorf("a relative path is relative to the file: got %s, want %s", got, want)
	}
	if got := cfg.Groups[0].Members[0].Settings; got["token_serial"] != "0012" || got["conf"] != filepath.Join(f.dir, "a.conf") || got["module"] != "/usr/lib/x.so" {
		t.Errorf("settings: got %v", got)
	}
	if got := cfg.Warnings; len(got) != 1 || got[0] != "the variable KMSD_TYPO sets nothing that kmsd knows" {
		t.Errorf("warnings: got %q", got)
	}
	k := cfg.KMS(nil, nil)
	g := k.Groups[0]
	if g.Name != "default" || g.MinCopies != 2 || g.CommandTimeout != 20*time.Second || g.ProbeInterval != 2*time.Second || !g.NoHedge ||
		!g.Recovery.Manual || g.Recovery.Interval != 90*time.Second || g.Recovery.Retries != 3 || !g.PlainCount || k.Insecure {
		t.Errorf("group: got %+v", g)
	}
	if !g.Members[1].Standby || g.Members[0].SHA256 != f.sum {
		t.Errorf("members: got %+v", g.Members)
	}
	for i, want := range []string{"1234-a", "pin-of-b", "pin-of-c"} {
		if got, err := g.Members[i].PIN(context.Background()); err != nil || string(got) != want {
			t.Errorf("PIN of member %d: got %q, %v; want %q", i, got, err, want)
		}
	}
	if got, err := g.Domain(context.Background()); err != nil || len(got) != 44 {
		t.Errorf("domain secret: got %d bytes, %v", len(got), err)
	}
}

func TestSecretsAreReadAnew(t *testing.T) {
	f := newFixture(t)
	cfg, err := config.Load(f.file(t, sound), config.Options{Environ: []string{"KMSD_PIN_B=b"}})
	if err != nil {
		t.Fatal(err)
	}
	pin := cfg.KMS(nil, nil).Groups[0].Members[0].PIN
	path := filepath.Join(f.dir, "a.pin")
	if err := os.WriteFile(path, []byte("changed\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := pin(context.Background()); err != nil || string(got) != "changed" {
		t.Errorf("got %q, %v; want the changed PIN", got, err)
	}
	if err := os.Chmod(path, 0o604); err != nil {
		t.Fatal(err)
	}
	_, err = pin(context.Background())
	if err == nil || !strings.Contains(err.Error(), "reading the PIN of member hsm-a: mode 0604 lets others at") {
		t.Errorf("got %v, want a refusal of the mode", err)
	}
}

func TestLaterLayersWin(t *testing.T) {
	f := newFixture(t)
	path := f.file(t, sound)
	flags := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	config.AddFlags(flags)
	if err := flags.Parse([]string{"--log-level", "debug", "--listen", "https://127.0.0.1:3"}); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(path, config.Options{Flags: flags, Environ: []string{
		"KMSD_PIN_B=b", "KMSD_LOG_LEVEL=error", "KMSD_LISTEN=https://127.0.0.1:1,https://127.0.0.1:2", "KMSD_AUDIT_FILE=" + f.dir + "/env.jsonl",
	}})
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Log.Level != "debug" {
		t.Errorf("log level: got %s, want that of the flag", cfg.Log.Level)
	}
	if len(cfg.Listen) != 1 || cfg.Listen[0] != "https://127.0.0.1:3" {
		t.Errorf("listen: got %v, want that of the flag", cfg.Listen)
	}
	if cfg.Audit.File != f.dir+"/env.jsonl" {
		t.Errorf("audit file: got %s, want that of the variable", cfg.Audit.File)
	}
}

func TestFaultsOfVariablesAndFlagsNameThem(t *testing.T) {
	f := newFixture(t)
	flags := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	config.AddFlags(flags)
	if err := flags.Parse([]string{"--log-level", "loud"}); err != nil {
		t.Fatal(err)
	}
	_, err := config.Load(f.file(t, sound), config.Options{Flags: flags, Environ: []string{"KMSD_PIN_B=b", "KMSD_TLS_CERT=/no/cert.pem"}})
	want := "the configuration has 2 faults:\n" +
		"  KMSD_TLS_CERT: tls.cert: /no/cert.pem: no such file or directory\n" +
		`  --log-level: log.level: "loud" is none of trace, debug, info, warn, error`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%v", err, want)
	}
}

func TestDevNeedsNoSums(t *testing.T) {
	f := newFixture(t)
	path := f.file(t, strings.ReplaceAll(strings.ReplaceAll(sound, "        sha256: $SUM\n", ""), "sha256: $SUM, ", ""))
	cfg, err := config.Load(path, config.Options{Dev: true, Environ: []string{"KMSD_PIN_B=b"}})
	if err != nil {
		t.Fatal(err)
	}
	if !cfg.KMS(nil, nil).Insecure {
		t.Error("members without a sum need Insecure")
	}
	if _, err := config.Load(path, config.Options{Environ: []string{"KMSD_PIN_B=b"}}); err == nil || !strings.Contains(err.Error(), "sha256: "+f.sum) {
		t.Errorf("got %v, want the sum to paste", err)
	}
}

var update = flag.Bool("update", false, "write the expected faults anew")

func TestFaults(t *testing.T) {
	files, err := filepath.Glob("testdata/faults/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		file, err := filepath.Abs(file)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			f := newFixture(t)
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			t.Chdir(f.dir)
			f.file(t, string(ar.Files[0].Data))
			_, err = config.Load("kmsd.yaml", config.Options{Environ: []string{"PIN_A=1234"}, Modules: true})
			if err == nil {
				t.Fatal("no fault was found")
			}
			got := strings.NewReplacer(f.dir, "$DIR", f.sum, "$SUM").Replace(err.Error()) + "\n"
			if *update {
				ar.Files[1].Data = []byte(got)
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if want := string(ar.Files[1].Data); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

func TestAConfigurationThatAnybodyCanChangeIsRefused(t *testing.T) {
	f := newFixture(t)
	path := f.file(t, sound)
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	_, err := config.Load(path, config.Options{Environ: []string{"KMSD_PIN_B=b"}})
	if err == nil || !strings.HasSuffix(err.Error(), "kmsd.yaml:1: mode 0666 lets anybody change it; chmod 600 it") {
		t.Errorf("got %v", err)
	}
}

func TestAConfigurationOfAnotherUserIsRefused(t *testing.T) {
	f := newFixture(t)
	path := f.file(t, sound)
	giveAway(t, path)
	_, err := config.Load(path, config.Options{Environ: []string{"KMSD_PIN_B=pin"}})
	if os.Geteuid() == 0 && !strings.Contains(fmt.Sprint(err), "kmsd.yaml:1: it belongs to another user") {
		t.Errorf("got %v", err)
	}
}

// giveAway makes a file another user's. Only root can do that.
func giveAway(t *testing.T, path string) {
	t.Helper()
	if err := os.Chown(path, 65534, 65534); (err == nil) != (os.Geteuid() == 0) {
		t.Fatalf("giving %s away: %v", path, err)
	}
}

func TestSoundLeavesOutWhatHasFaults(t *testing.T) {
	f := newFixture(t)
	opts := config.Options{Environ: []string{"KMSD_PIN_B=pin-of-b"}}
	members := func(text string) (names string) {
		t.Helper()
		cfg, err := config.Inspect(f.file(t, text), opts)
		if cfg == nil {
			t.Fatal(err)
		}
		for _, g := range cfg.Sound().Groups {
			for _, m := range g.Members {
				names += g.Name + "/" + m.Name + " "
			}
		}
		return names
	}
	const all = "default/hsm-a default/hsm-b default/hsm-c "
	for _, c := range []struct{ name, old, new, want string }{
		{"a sound configuration has all its members", "", "", all},
		{"a fault elsewhere matters to no member", "hedge: false", "hegde: false", all},
		{"a member with a fault is left out", "pin: {file: a.pin}", "pin: {file: world.pin}", "default/hsm-b default/hsm-c "},
		{"a member with an unknown key is left out", "standby: true", "standbye: true", "default/hsm-a default/hsm-c "},
		{"a group without a good name is called by its place", "name: default", "name: De Fault", "groups[0]/hsm-a groups[0]/hsm-b groups[0]/hsm-c "},
		{"a bad domain secret keeps nobody out", "{file: domain}", "{file: short}", all},
		{"without drivers there is nothing to try", "driver_dir: drivers", "driver_dir: nowhere", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := members(strings.Replace(sound, c.old, c.new, 1)); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	t.Run("nothing of a file that anybody can change is run", func(t *testing.T) {
		path := f.file(t, sound)
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
		cfg, err := config.Inspect(path, opts)
		if cfg == nil || len(cfg.Sound().Groups) != 0 {
			t.Errorf("got %+v (%v)", cfg, err)
		}
	})
}

func TestMembersAreLimited(t *testing.T) {
	f := newFixture(t)
	var b strings.Builder
	for i := range 33 {
		fmt.Fprintf(&b, "      - {name: m%d, driver: fake, sha256: $SUM, pin: {file: a.pin}, settings: {token_label: m%[1]d}}\n", i)
	}
	head, tail, _ := strings.Cut(sound, "      - name: hsm-a")
	_, tail, _ = strings.Cut(tail, "auth:")
	_, err := config.Load(f.file(t, head+b.String()+"auth:"+tail), config.Options{Environ: []string{}})
	if err == nil || !strings.HasSuffix(err.Error(), "kmsd.yaml:15: groups[0].members: 33 members; at most 32") {
		t.Errorf("got %v", err)
	}
}

func TestFaultsOfSyntaxHaveTheirLine(t *testing.T) {
	f := newFixture(t)
	_, err := config.Load(f.file(t, "listen: []\ntls: {}\n\tcatalog: x\n"), config.Options{Environ: []string{}})
	if err == nil || !strings.Contains(err.Error(), "kmsd.yaml:3: not YAML: ") {
		t.Errorf("got %v", err)
	}
}

func TestTLSIsReadAnew(t *testing.T) {
	f := newFixture(t)
	cfg, err := config.Load(f.file(t, sound), config.Options{Environ: []string{"KMSD_PIN_B=b"}})
	if err != nil {
		t.Fatal(err)
	}
	before, err := cfg.TLS.Load()
	if err != nil {
		t.Fatal(err)
	}
	if before.MinVersion != tls.VersionTLS13 || before.ClientAuth != tls.VerifyClientCertIfGiven || before.ClientCAs == nil {
		t.Errorf("got %+v", before)
	}
	stamp := cfg.TLS.Stamp()
	cert, key := certificate(t)
	if err := os.WriteFile(cfg.TLS.Cert, []byte(cert+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if cfg.TLS.Stamp() == stamp {
		t.Error("a changed file has the same stamp")
	}
	if _, err := cfg.TLS.Load(); err == nil || !strings.Contains(err.Error(), "reading the certificate: tls: private key does not match public key") {
		t.Errorf("got %v, want a refusal of the old key", err)
	}
	if err := os.WriteFile(cfg.TLS.Key, []byte(key), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := cfg.TLS.Load(); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(cfg.TLS.Key, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := cfg.TLS.Load(); err == nil || !strings.Contains(err.Error(), "mode 0644 lets others at") {
		t.Errorf("got %v, want a refusal of the mode", err)
	}
}

func TestACertificateThatEndsIsWorthAWarning(t *testing.T) {
	for _, c := range []struct {
		life time.Duration
		want string
	}{
		{90 * 24 * time.Hour, ""},
		{24 * time.Hour, "the certificate of the server ends at 2"},
		{-time.Hour, "the certificate of the server ended at 2"},
	} {
		f := newFixture(t)
		cert, key := certificateFor(t, c.life)
		for name, text := range map[string]string{"server.pem": cert, "server.key": key} {
			if err := os.WriteFile(filepath.Join(f.dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cfg, err := config.Load(f.file(t, sound+"vault: {listen: \"https://127.0.0.1:8421\", mounts: {m: {database: shop}}}\n"),
			config.Options{Environ: []string{"KMSD_PIN_B=b"}})
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(cfg.Warnings, "; "); !strings.HasPrefix(got, c.want) || (got == "") != (c.want == "") || strings.Contains(got, "; the certificate") {
			t.Errorf("with %v left: %q, want %q", c.life, got, c.want)
		}
	}
}

func TestListenAddresses(t *testing.T) {
	for addr, want := range map[string][2]string{
		"https://127.0.0.1:8420":     {"tcp", "127.0.0.1:8420"},
		"https://[::1]:0":            {"tcp", "[::1]:0"},
		"https://:8420/":             {"tcp", ":8420"},
		"unix:///run/kmsd/kmsd.sock": {"unix", "/run/kmsd/kmsd.sock"},
	} {
		network, address, err := config.ParseListen(addr)
		if err != nil || network != want[0] || address != want[1] {
			t.Errorf("%s: got %s %s %v, want %v", addr, network, address, err, want)
		}
	}
	if _, _, err := config.ParseListen("unix:///" + strings.Repeat("x", 120)); err == nil || !strings.Contains(err.Error(), "may have 107 bytes") {
		t.Errorf("got %v, want a refusal of the length", err)
	}
}

func TestSecretsHoldNoSecretInErrors(t *testing.T) {
	f := newFixture(t)
	text := strings.ReplaceAll(sound, "domain: {file: domain}", "domain: {env: SHORT}")
	_, err := config.Load(f.file(t, text), config.Options{Environ: []string{"KMSD_PIN_B=b", "SHORT=sesame"}})
	if err == nil || strings.Contains(err.Error(), "sesame") {
		t.Errorf("got %v, want an error without the secret", err)
	}
}

func TestExecSecretIsBounded(t *testing.T) {
	f := newFixture(t)
	cfg, err := config.Load(f.file(t, strings.Replace(sound, "[printf, pin-of-c]", "[head, -c, 100000, /dev/zero]", 1)), config.Options{Environ: []string{"KMSD_PIN_B=b"}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = cfg.KMS(nil, nil).Groups[0].Members[2].PIN(context.Background())
	if err == nil || !strings.Contains(err.Error(), "more than 4096 bytes") {
		t.Errorf("got %v, want a refusal", err)
	}
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte(sound))
	files, _ := filepath.Glob("testdata/faults/*.txtar")
	for _, file := range files {
		ar, err := txtar.ParseFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(ar.Files[0].Data)
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte) {
		// Programs are not run by Load, and no file outside is written: any text is
		// safe to try.
		path := filepath.Join(dir, "kmsd.yaml")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, err := config.Load(path, config.Options{Environ: []string{"KMSD_LOG_LEVEL=info"}})
		if (cfg == nil) == (err == nil) {
			t.Errorf("got %v and %v: one of them, please", cfg, err)
		}
		// What is tried in spite of faults is no more than what was written.
		seen, err := config.Inspect(path, config.Options{Environ: []string{"KMSD_LOG_LEVEL=info"}})
		if seen == nil {
			return
		}
		for _, g := range seen.Sound().Groups {
			for _, m := range g.Members {
				if f := seen.MemberFault(m, "x"); err != nil && strings.Contains(err.Error(), ": "+f.Path+".") {
					t.Errorf("a member with a fault counts as sound: %v", err)
				}
			}
		}
	})
}
