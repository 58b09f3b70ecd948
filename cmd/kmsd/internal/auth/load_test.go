package auth_test

import (
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/auth"
)

const goodHash = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

func TestEveryFaultIsReportedWithItsLine(t *testing.T) {
	cfg := files(t, `tokens:
  - name: app
    sha256: `+goodHash+`
    policies: [shop, none]
  - name: app
    sha256: `+goodHash+`
    policies: [shop]
  - {name: short, sha256: 9f86, policies: [shop]}
  - {name: local:0, sha256: `+strings.Repeat("1", 64)+`, policies: []}
  - {name: late, sha256: `+strings.Repeat("2", 64)+`, policies: [shop], expires: tomorrow}
  - {name: "two words", sha256: `+strings.Repeat("3", 64)+`, policies: [shop], colour: red}
  - {sha256: `+strings.Repeat("4", 64)+`}
  - just text
certificates:
  - {name: bare, policies: [shop]}
  - {name: cn-1, common_name: x, policies: [shop]}
  - {name: cn-2, common_name: x, policies: [shop]}
  - {name: twice, name: thrice, common_name: y, policies: [shop]}
people: []
`, `policies:
  shop:
    - {actions: [wrap, fly], keys: ["shop-*"]}
    - {actions: [wrap]}
    - {actions: [random, wrap], keys: ["shop-*"]}
    - {actions: ["*"]}
    - {keys: ["shop-*"]}
    - {actions: [wrap], keys: ["[a-z]"]}
    - {actions: [wrap], keys: shop}
    - {actions: [wrap], keys: [a], hours: 9-17}
  shop: []
`)
	_, err := auth.New(cfg)
	if err == nil {
		t.Fatal("no fault is found")
	}
	text := err.Error()
	want := []string{
		`policies.yaml:3: unknown action "fly"; there are create, read,`,
		`policies.yaml:4: action "wrap" needs keys`,
		`policies.yaml:5: action "random" has no key`,
		`policies.yaml:6: action "*" needs keys`,
		`policies.yaml:7: a rule needs actions`,
		`policies.yaml:8: glob "[a-z]": '[' is in no key name`,
		`policies.yaml:9: keys must be a list`,
		`policies.yaml:10: a rule has no field "hours"`,
		`policies.yaml:11: policy "shop" is there already in line 2`,
		`tokens.yaml:4: there is no policy "none"`,
		`tokens.yaml:5: the name "app" is there already in line 2`,
		`tokens.yaml:5: the token of app is the token of app`,
		`tokens.yaml:8: sha256 must be 64 hexadecimal digits`,
		`tokens.yaml:9: the name "local:0" is for local principals`,
		`tokens.yaml:9: policies is empty`,
		`tokens.yaml:10: expires "tomorrow" is not a time like`,
		`tokens.yaml:11: a name has letters, digits and . _ - @ : / but not ' '`,
		`tokens.yaml:11: a token has no field "colour"`,
		`tokens.yaml:12: a token needs name`,
		`tokens.yaml:12: a token needs policies`,
		`tokens.yaml:13: a token must be a mapping`,
		`tokens.yaml:15: a certificate needs sha256, common_name or both`,
		`tokens.yaml:17: the certificate of cn-2 is the certificate of cn-1`,
		`tokens.yaml:18: field "name" is there already in line 18`,
		`tokens.yaml:19: the file has no field "people"`,
	}
	at := 0
	for _, w := range want {
		i := strings.Index(text[at:], w)
		if i < 0 {
			t.Errorf("after byte %d there is no %q in:\n%s", at, w, text)
			continue
		}
		at += i
	}
	if n := strings.Count(text, "\n") + 1; n != len(want) {
		t.Errorf("%d faults, want %d:\n%s", n, len(want), text)
	}
}

func TestFilesAreRefused(t *testing.T) {
	const tokens, policies = "tokens: []", "policies: {p: []}"
	cases := []struct {
		name string
		make func(cfg auth.Config)
		says string
	}{
		{"tokens that the group may read", func(cfg auth.Config) { os.Chmod(cfg.Tokens, 0o640) }, "tokens.yaml: its mode is 0640, but nobody but its owner may read or write it (chmod 0600)"},
		{"tokens that everybody may read", func(cfg auth.Config) { os.Chmod(cfg.Tokens, 0o604) }, "its mode is 0604"},
		{"policies that everybody may write", func(cfg auth.Config) { os.Chmod(cfg.Policies, 0o666) }, "policies.yaml: its mode is 0666, but everybody may write it (chmod 0664)"},
		{"tokens that are missing", func(cfg auth.Config) { os.Remove(cfg.Tokens) }, "no such file"},
		{"policies that are a folder", func(cfg auth.Config) { os.Remove(cfg.Policies); os.Mkdir(cfg.Policies, 0o755) }, "not a regular file"},
		{"what is not YAML", func(cfg auth.Config) { os.WriteFile(cfg.Policies, []byte("policies: {p: ["), 0o644) }, "policies.yaml:1: not YAML: did not find"},
		{"two documents", func(cfg auth.Config) { os.WriteFile(cfg.Policies, []byte("policies: {}\n---\npolicies: {}"), 0o644) }, "second document"},
		{"a policy that another refers to", func(cfg auth.Config) {
			os.WriteFile(cfg.Policies, []byte("policies: {a: &x [{actions: [wrap], keys: ['*']}], b: *x}"), 0o644)
		}, "policy b must be a list"},
		{"more than the limit", func(cfg auth.Config) { os.WriteFile(cfg.Policies, make([]byte, 5<<20), 0o644) }, "more than 4194304 bytes"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			cfg := files(t, tokens, policies)
			mustNew(t, cfg)
			c.make(cfg)
			if _, err := auth.New(cfg); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want %q", err, c.says)
			}
		})
	}
}

func TestFilesOfAnotherUserAreRefused(t *testing.T) {
	for _, name := range []string{"tokens.yaml", "policies.yaml"} {
		cfg := files(t, "tokens: []", "policies: {p: []}")
		path := filepath.Join(filepath.Dir(cfg.Tokens), name)
		if err := os.Chown(path, 65534, 65534); (err == nil) != (os.Geteuid() == 0) {
			t.Fatal(err) // only root can give a file away
		}
		if _, err := auth.New(cfg); os.Geteuid() == 0 && (err == nil || !strings.Contains(err.Error(), name+": it belongs to another user")) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEmptyFilesAndNoFilesAreNobody(t *testing.T) {
	for _, cfg := range []auth.Config{{}, files(t, "", ""), files(t, "# none yet\n", "# none yet\n")} {
		a := mustNew(t, cfg)
		token, _ := auth.NewToken()
		if _, err := a.Authenticate(t.Context(), auth.Credentials{Token: token}); err == nil {
			t.Errorf("%+v: a token is accepted", cfg)
		}
	}
}

// FuzzFiles reads foreign files; and what a glob matches is what path.Match says
// about names without a slash.
func FuzzFiles(f *testing.F) {
	f.Add("tokens: [{name: a, sha256: "+goodHash+", policies: [p]}]", "policies: {p: [{actions: [wrap], keys: ['a*b?c*']}]}", "a*b?c*", "axbycz")
	f.Add("certificates: [{name: a, common_name: b, policies: [p]}]", "policies:\n  p:\n  - actions: ['*']\n    keys: ['*']", "*-*-*", "a--b")
	f.Add("{", "- - -", "?", "")
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, tokens, policies, glob, name string) {
		cfg := auth.Config{Tokens: filepath.Join(dir, "tokens.yaml"), Policies: filepath.Join(dir, "policies.yaml")}
		write(t, cfg.Tokens, tokens, 0o600)
		write(t, cfg.Policies, policies, 0o644)
		if _, err := auth.New(cfg); err != nil && !strings.Contains(err.Error(), ".yaml") {
			t.Errorf("error without its file: %v", err)
		}

		if strings.ContainsAny(glob, `[]\/`) || strings.ContainsAny(name, "/") || !ascii(glob) || !ascii(name) || len(glob)+len(name) > 100 {
			return
		}
		want, err := path.Match(glob, name)
		if err == nil && auth.Match(glob, name) != want {
			t.Errorf("glob %q, name %q: path.Match says %v", glob, name, want)
		}
	})
}

func ascii(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool { return r > 126 }) < 0
}
