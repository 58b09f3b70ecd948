package dev_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/auth"
	"kmsd/cmd/kmsd/internal/config"
	"kmsd/cmd/kmsd/internal/dev"
)

// initToken stands for the driver: it makes a "token" that holds what it was told,
// in the directory that the configuration of SoftHSM names. It dies half way when
// there is a file DRIVER_DIR/die.
const initToken = `#!/bin/sh
[ "$1" = init-token ] || exit 2
request=$(cat)
conf=$(printf %s "$request" | sed 's/.*"softhsm_conf":"\([^"]*\)".*/\1/')
dir=$(sed -n 's/^directories.tokendir = //p' "$conf")
mkdir "$dir/half" || exit 1
[ -e "$(dirname "$0")/die" ] && { echo "the token is full" >&2; exit 1; }
printf %s "$request" > "$dir/token"
env > "$dir/env"
rmdir "$dir/half"
echo '{"serial":"1","slot":0}'
`

func newOptions(t *testing.T) dev.Options {
	t.Helper()
	drivers := t.TempDir()
	if err := os.WriteFile(filepath.Join(drivers, "kmsd-driver-softhsm"), []byte(initToken), 0o755); err != nil {
		t.Fatal(err)
	}
	return dev.Options{Dir: filepath.Join(t.TempDir(), "site"), Listen: "127.0.0.1:0", DriverDir: drivers}
}

func prepare(t *testing.T, opts dev.Options) *dev.Site {
	t.Helper()
	s, err := dev.Prepare(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func closeSite(t *testing.T, s *dev.Site) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// snapshot reads every file below a directory. :: path → mode and content
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Type() == fs.ModeSocket {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path) // both are absolute
		files[rel] = fmt.Sprintf("%v %s", info.Mode(), b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestTheDriverGetsNoneOfOurEnvironment(t *testing.T) {
	t.Setenv("KMSD_TOKEN", "a secret of ours")
	s := prepare(t, newOptions(t))
	defer closeSite(t, s)
	b, err := os.ReadFile(filepath.Join(s.Dir, "tokens/hsm-a/env"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), "KMSD_TOKEN") {
		t.Errorf("the driver that makes a token sees:\n%s", b)
	}
}

func TestPrepareMakesASoundSite(t *testing.T) {
	s := prepare(t, newOptions(t))
	defer closeSite(t, s)
	cfg, err := config.Load(s.Config, config.Options{Environ: []string{}})
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Members; !slices.Equal(got, []string{"hsm-a", "hsm-b", "hsm-c"}) {
		t.Errorf("members: got %v", got)
	}
	if len(cfg.Groups) != 1 || len(cfg.Groups[0].Members) != 3 || cfg.Groups[0].Name != "default" {
		t.Errorf("got %+v", cfg.Groups)
	}
	if _, err := auth.New(auth.Config{Tokens: cfg.Auth.Tokens, Policies: cfg.Auth.Policies}); err != nil {
		t.Error(err)
	}
	for _, addr := range cfg.Listen {
		if strings.HasPrefix(addr, "https:") && (s.Listeners[addr] == nil || addr != s.Addr) {
			t.Errorf("%s is not open; %s is announced", addr, s.Addr)
		}
	}
	for name, content := range snapshot(t, s.Dir) {
		if filepath.Dir(name) == "." && !strings.HasPrefix(content, "-rw------- ") {
			t.Errorf("%s is not private: %s", name, content[:10])
		}
	}
}

func TestCertificatesFitEachOther(t *testing.T) {
	s := prepare(t, newOptions(t))
	defer closeSite(t, s)
	pem, err := os.ReadFile(filepath.Join(s.Dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	for name, usage := range map[string]x509.ExtKeyUsage{"server": x509.ExtKeyUsageServerAuth, "client": x509.ExtKeyUsageClientAuth} {
		pair, err := tls.LoadX509KeyPair(filepath.Join(s.Dir, name+".pem"), filepath.Join(s.Dir, name+".key"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, host := range []string{"localhost", "127.0.0.1", "::1"} {
			if err := pair.Leaf.VerifyHostname(host); name == "server" && err != nil {
				t.Error(err)
			}
		}
	}
}

func TestASecondStartGoesOnWithTheSame(t *testing.T) {
	opts := newOptions(t)
	opts.Members = 2
	s := prepare(t, opts)
	closeSite(t, s)
	before := snapshot(t, s.Dir)
	opts.Members = 0 // as many as there are
	s = prepare(t, opts)
	defer closeSite(t, s)
	after := snapshot(t, s.Dir)
	for name, content := range before {
		if name != "kmsd.yaml" && after[name] != content {
			t.Errorf("%s has changed", name)
		}
	}
	if !slices.Equal(s.Members, []string{"hsm-a", "hsm-b"}) {
		t.Errorf("members: got %v, want those that are there", s.Members)
	}
}

func TestEnvIsThereOnlyWhileTheServerAnswers(t *testing.T) {
	opts := newOptions(t)
	opts.Dir = filepath.Join(t.TempDir(), "it's a site")
	s := prepare(t, opts)
	env := filepath.Join(s.Dir, "env.sh")
	if _, err := os.Stat(env); err == nil {
		t.Error("env.sh is there before the server answers")
	}
	if err := s.Announce(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(env)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("export KMSD_ADDR='%s'\nexport KMSD_CACERT='%s/ca.pem'\nexport KMSD_TOKEN='kmsd_", s.Addr, strings.ReplaceAll(s.Dir, "'", `'\''`))
	if !strings.HasPrefix(string(b), want) {
		t.Errorf("got %s, want it to begin with %s", b, want)
	}
	closeSite(t, s)
	if _, err := os.Stat(env); err == nil {
		t.Error("env.sh is still there when the server has ended")
	}
	// One that a killed server has left behind fools nobody.
	if err := os.WriteFile(env, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s = prepare(t, opts)
	defer closeSite(t, s)
	if _, err := os.Stat(env); err == nil {
		t.Error("env.sh of an earlier server is still there")
	}
}

// TestAHalfMadeSiteIsFinished takes away what a crash at any step would have left
// out, which is any file that was made after another.
func TestAHalfMadeSiteIsFinished(t *testing.T) {
	opts := newOptions(t)
	s := prepare(t, opts)
	closeSite(t, s)
	for name := range snapshot(t, s.Dir) {
		switch name {
		case "admin.token", "lock":
			continue // made before what depends on them
		case "hsm-a.pin", "hsm-b.pin", "hsm-c.pin", "hsm-a.so-pin", "hsm-b.so-pin", "hsm-c.so-pin":
			continue // they are made before their token
		}
		if strings.HasPrefix(name, "tokens/") {
			continue // appears whole
		}
		t.Run(name, func(t *testing.T) {
			if err := os.Remove(filepath.Join(s.Dir, name)); err != nil {
				t.Fatal(err)
			}
			s := prepare(t, opts)
			defer closeSite(t, s)
			if _, err := config.Load(s.Config, config.Options{Environ: []string{}}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestATokenThatIsHalfMadeIsMadeAnew(t *testing.T) {
	opts := newOptions(t)
	die := filepath.Join(opts.DriverDir, "die")
	if err := os.WriteFile(die, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := dev.Prepare(t.Context(), opts)
	if err == nil || !strings.Contains(err.Error(), "making the token of hsm-a: ") || !strings.Contains(err.Error(), "the token is full") {
		t.Errorf("got %v, want what the driver says", err)
	}
	if err := os.Remove(die); err != nil {
		t.Fatal(err)
	}
	s := prepare(t, opts)
	defer closeSite(t, s)
	token, err := os.ReadFile(filepath.Join(s.Dir, "tokens/hsm-a/token"))
	if err != nil {
		t.Fatal(err)
	}
	pin, err := os.ReadFile(filepath.Join(s.Dir, "hsm-a.pin"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(token), `"pin":"`+strings.TrimSpace(string(pin))+`"`) {
		t.Error("the token has another PIN than its file")
	}
	left, err := filepath.Glob(filepath.Join(s.Dir, "*new*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestPrepareRefuses(t *testing.T) {
	good := newOptions(t)
	running := prepare(t, good)
	defer closeSite(t, running)
	other := newOptions(t)
	other.Listen = strings.TrimPrefix(running.Addr, "https://")
	noDriver := newOptions(t)
	noDriver.DriverDir = t.TempDir()
	many := newOptions(t)
	many.Members = 27
	for _, tt := range []struct {
		name string
		opts dev.Options
		want string
	}{
		{"a directory that is in use", good, "another kmsd dev runs in "},
		{"an address that is in use", other, "is in use; --listen 127.0.0.1:0 picks a free port"},
		{"to run without a driver", noDriver, `"make build" puts it beside kmsd`},
		{"more members than letters", many, "27 members; 1 to 26 can be made"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := dev.Prepare(context.Background(), tt.opts)
			if err == nil {
				closeSite(t, s)
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestADirectoryOfOthersIsRefused(t *testing.T) {
	opts := newOptions(t)
	if err := os.Mkdir(opts.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(opts.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := dev.Prepare(t.Context(), opts); err == nil || !strings.Contains(err.Error(), "mode 0777 lets anybody change what is in ") {
		t.Errorf("got %v", err)
	}
	if left, err := os.ReadDir(opts.Dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}
