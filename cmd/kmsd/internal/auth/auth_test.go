package auth_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/cmd/kmsd/internal/auth"
	"kmsd/kms/api"
)

// files writes a tokens and a policies file and returns where they are.
func files(t testing.TB, tokens, policies string) auth.Config {
	t.Helper()
	dir := t.TempDir()
	cfg := auth.Config{Tokens: filepath.Join(dir, "tokens.yaml"), Policies: filepath.Join(dir, "policies.yaml")}
	write(t, cfg.Tokens, tokens, 0o600)
	write(t, cfg.Policies, policies, 0o644)
	return cfg
}

func write(t testing.TB, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func mustNew(t testing.TB, cfg auth.Config) *auth.Auth {
	t.Helper()
	a, err := auth.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newCert(t *testing.T, cn string, until time.Time) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn}, NotBefore: until.Add(-time.Hour), NotAfter: until}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestAuthenticate(t *testing.T) {
	token, hash := auth.NewToken()
	old, oldHash := auth.NewToken()
	stranger, _ := auth.NewToken()
	later := time.Now().Add(time.Hour)
	named, pinned, both := newCert(t, "backup", later), newCert(t, "whoever", later), newCert(t, "both", later)
	other, late := newCert(t, "both", later), newCert(t, "backup", time.Now().Add(-time.Minute))
	chosenSum := sha256.Sum256([]byte("secret"))

	a := mustNew(t, files(t, fmt.Sprintf(`
tokens:
  - {name: shop-app, sha256: %s, policies: [p]}
  - {name: old, sha256: %s, policies: [p], expires: 2020-01-01T00:00:00Z}
  - {name: chosen, sha256: %x, policies: [p]}
certificates:
  - {name: by-name, common_name: backup, policies: [p]}
  - {name: by-sum, sha256: %X, policies: [p]}
  - {name: by-both, sha256: %x, common_name: both, policies: [p]}
`, hash, oldHash, chosenSum, sha256.Sum256(pinned.Raw), sha256.Sum256(both.Raw)), "policies: {p: [{actions: [read], keys: ['*']}]}"))

	cases := []struct {
		name string
		cr   auth.Credentials
		want string // the principal
		says string // the refusal
	}{
		{"a known token", auth.Credentials{Token: token}, "shop-app", ""},
		{"an expired token", auth.Credentials{Token: old}, "", "the token of old expired at 2020-01-01T00:00:00Z"},
		{"a token of a stranger", auth.Credentials{Token: stranger}, "", "the token is not known"},
		{"a token with another end", auth.Credentials{Token: token[:len(token)-1] + "!"}, "", "not one of kmsd's"},
		{"a token with more behind it", auth.Credentials{Token: token + "A"}, "", "not one of kmsd's"},
		{"the hash in place of the token", auth.Credentials{Token: hash}, "", "not one of kmsd's"},
		{"a chosen secret, though its hash is in the file", auth.Credentials{Token: "secret"}, "", "not one of kmsd's"},
		{"a certificate by its common name", auth.Credentials{Certificate: named}, "by-name", ""},
		{"a certificate by its hash", auth.Credentials{Certificate: pinned}, "by-sum", ""},
		{"a certificate by both", auth.Credentials{Certificate: both}, "by-both", ""},
		{"a certificate with the name but not the hash", auth.Credentials{Certificate: other}, "", "belongs to nobody"},
		{"a certificate that expired on an open connection", auth.Credentials{Certificate: late}, "", "is valid from"},
		{"root on a unix socket", auth.Credentials{Peer: &auth.Peer{UID: 0}}, "local:0", ""},
		{"kmsd's own user on a unix socket", auth.Credentials{Peer: &auth.Peer{UID: os.Geteuid()}}, fmt.Sprintf("local:%d", os.Geteuid()), ""},
		{"another user on a unix socket", auth.Credentials{Peer: &auth.Peer{UID: 54321}}, "", "user 54321 is neither root"},
		{"another user on a unix socket with a token", auth.Credentials{Peer: &auth.Peer{UID: 54321}, Token: token}, "shop-app", ""},
		{"a wrong token beside a good certificate", auth.Credentials{Token: stranger, Certificate: named}, "", "the token is not known"},
		{"a wrong certificate of root", auth.Credentials{Certificate: other, Peer: &auth.Peer{}}, "", "belongs to nobody"},
		{"nothing", auth.Credentials{}, "", "neither a token nor a client certificate"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			p, err := a.Authenticate(t.Context(), c.cr)
			if c.says == "" {
				if err != nil || p.Name() != c.want {
					t.Errorf("%q, %v, want %q", p.Name(), err, c.want)
				}
				return
			}
			if !errors.Is(err, api.ErrUnauthenticated) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want %q", err, c.says)
			}
			if c.cr.Token != "" && strings.Contains(err.Error(), c.cr.Token) {
				t.Errorf("the error says the token: %v", err)
			}
			if p.May(auth.ActionRead, "x") {
				t.Error("nobody may read")
			}
		})
	}
}

func TestTokenExpiresInUse(t *testing.T) {
	token, hash := auth.NewToken()
	synctest.Test(t, func(t *testing.T) {
		at := time.Now().Add(time.Minute).UTC()
		a := mustNew(t, files(t, fmt.Sprintf("tokens: [{name: a, sha256: %s, policies: [p], expires: %s}]", hash, at.Format(time.RFC3339)), "policies: {p: [{actions: [group-read]}]}"))
		p, err := a.Authenticate(t.Context(), auth.Credentials{Token: token})
		if err != nil || !p.May("group-read", "") {
			t.Error(p, err)
		}
		<-time.After(time.Minute)
		if p.May("group-read", "") {
			t.Error("who came in before the expiry may stay")
		}
		if _, err := a.Authenticate(t.Context(), auth.Credentials{Token: token}); !errors.Is(err, api.ErrUnauthenticated) {
			t.Errorf("at its expiry: %v", err)
		}
	})
}

func TestAllow(t *testing.T) {
	a, tokens := withPolicies(t, `
policies:
  app:
    - {actions: [wrap, unwrap], keys: ["shop-*", "till"]}
    - {actions: [group-read]}
  erp:
    - {actions: [named-get, named-put], keys: ["erp"]}
  keeper:
    - {actions: [backup]}
  lister:
    - {actions: [list], keys: ["shop-*"]}
  narrow-all:
    - {actions: ["*"], keys: ["test-?"]}
  everything:
    - {actions: ["*"], keys: ["*"]}
  nothing: []
`, "app", "erp", "keeper", "lister", "narrow-all", "everything", "nothing")
	cases := []struct {
		who, action, key string
		want             bool
	}{
		{"app", "wrap", "shop-1", true},
		{"app", "unwrap", "shop-", true},
		{"app", "unwrap", "till", true},
		{"app", "wrap", "tills", false},
		{"app", "wrap", "shop", false},
		{"app", "wrap", "a-shop-1", false},
		{"app", "wrap", "Shop-1", false},
		{"app", "wrap", "", false},
		{"app", "rewrap", "shop-1", false},
		{"app", "destroy", "shop-1", false},
		{"app", "group-read", "", true},
		{"app", "group-read", "shop-1", false},
		{"app", "group-admin", "", false},
		{"app", "random", "", false},
		{"erp", "named-get", "erp", true},
		{"erp", "named-get", "erp2", false},
		{"erp", "named-delete", "erp", false},
		{"erp", "unwrap", "erp", false},
		{"keeper", "backup", "", true},
		{"keeper", "named-get", "erp", false},
		{"app", "backup", "", false},
		{"narrow-all", "backup", "", false},
		{"everything", "backup", "", true},
		{"lister", "list", "shop-", true},
		{"lister", "list", "shop-a", true},
		{"lister", "list", "", false},
		{"lister", "read", "shop-a", false},
		{"narrow-all", "destroy", "test-1", true},
		{"narrow-all", "destroy", "test-10", false},
		{"narrow-all", "group-admin", "", false},
		{"narrow-all", "random", "", false},
		{"everything", "destroy", "any", true},
		{"everything", "group-admin", "", true},
		{"everything", "list", "", true},
		{"everything", "fly", "any", false},
		{"everything", "*", "any", false},
		{"everything", "", "", false},
		{"nothing", "read", "any", false},
		{"local", "destroy", "any", true},
		{"local", "group-admin", "", true},
		{"local", "fly", "any", false},
	}
	for _, c := range cases {
		t.Run(fmt.Sprintf("%s %s %q is %v", c.who, c.action, c.key, c.want), func(t *testing.T) {
			cr := auth.Credentials{Token: tokens[c.who]}
			if c.who == "local" {
				cr = auth.Credentials{Peer: &auth.Peer{}}
			}
			p, err := a.Authenticate(t.Context(), cr)
			if err != nil {
				t.Fatal(err)
			}
			if got := p.May(c.action, c.key); got != c.want {
				t.Errorf("May is %v", got)
			}
			if got := a.Allow(p, c.action, c.key); got != c.want {
				t.Errorf("Allow is %v", got)
			}
		})
	}
	if a.Allow(auth.Principal{}, "read", "any") {
		t.Error("a principal that nobody made may read")
	}
}

func TestEveryActionCanBeAllowed(t *testing.T) {
	for _, action := range auth.Actions() {
		a, tokens := withPolicies(t, fmt.Sprintf("policies: {p: [{actions: [%s], keys: ['*']}]}", action), "p")
		p, err := a.Authenticate(t.Context(), auth.Credentials{Token: tokens["p"]})
		if err != nil {
			t.Fatal(err)
		}
		for _, other := range auth.Actions() {
			if got := p.May(other, "key"); got != (other == action) {
				t.Errorf("a policy for %s: %s is %v", action, other, got)
			}
		}
	}
}

// withPolicies makes a token for each policy, of the same name.
func withPolicies(t *testing.T, policies string, names ...string) (*auth.Auth, map[string]string) {
	t.Helper()
	tokens, text := make(map[string]string), "tokens:\n"
	for _, name := range names {
		token, hash := auth.NewToken()
		tokens[name] = token
		text += fmt.Sprintf("  - {name: %s, sha256: %s, policies: [%s]}\n", name, hash, name)
	}
	return mustNew(t, files(t, text, policies)), tokens
}

func TestReloadTakesEffectAtOnceOrNotAtAll(t *testing.T) {
	token, hash := auth.NewToken()
	tokens := fmt.Sprintf("tokens: [{name: app, sha256: %s, policies: [p]}]", hash)
	cfg := files(t, tokens, "policies: {p: [{actions: [wrap], keys: ['*']}]}")
	a := mustNew(t, cfg)
	p, err := a.Authenticate(t.Context(), auth.Credentials{Token: token})
	if err != nil || !p.May("wrap", "k") {
		t.Fatal(err)
	}

	write(t, cfg.Policies, "policies: {p: [{actions: [read], keys: ['*']}, {actions: [fly], keys: ['*']}]}", 0o644)
	if err := a.Reload(); err == nil || !strings.Contains(err.Error(), `unknown action "fly"`) {
		t.Errorf("a bad file: %v", err)
	}
	if !p.May("wrap", "k") || p.May("read", "k") {
		t.Error("a bad file has taken effect")
	}
	write(t, cfg.Policies, "policies: {p: [{actions: [read], keys: ['*']}]}", 0o644)
	if err := a.Reload(); err != nil {
		t.Fatal(err)
	}
	if p.May("wrap", "k") || !p.May("read", "k") {
		t.Error("a good file has no effect on a principal that is there already")
	}
	write(t, cfg.Tokens, "tokens: []", 0o600)
	if err := a.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Authenticate(t.Context(), auth.Credentials{Token: token}); !errors.Is(err, api.ErrUnauthenticated) || p.May("read", "k") {
		t.Errorf("a removed token: %v, may read: %v", err, p.May("read", "k"))
	}
}

func TestNewTokenIsRandomAndItsHashIsThatOfTheWhole(t *testing.T) {
	seen := make(map[string]bool)
	for range 100 {
		token, hash := auth.NewToken()
		if seen[token] || len(token) != 48 || !strings.HasPrefix(token, "kmsd_") || fmt.Sprintf("%x", sha256.Sum256([]byte(token))) != hash {
			t.Fatalf("token of %d characters, hash %q", len(token), hash)
		}
		seen[token] = true
	}
}

func BenchmarkAuthenticateAndAllow(b *testing.B) {
	text := "tokens:\n"
	var token string
	for i := range 1000 {
		t, hash := auth.NewToken()
		token = t
		text += fmt.Sprintf("  - {name: app-%d, sha256: %s, policies: [p]}\n", i, hash)
	}
	a := mustNew(b, files(b, text, "policies: {p: [{actions: [read, unwrap], keys: ['till-*', 'shop-*']}]}"))
	b.ReportAllocs()
	for b.Loop() {
		p, err := a.Authenticate(context.Background(), auth.Credentials{Token: token})
		if err != nil || !p.May("unwrap", "shop-1") {
			b.Fatal(err)
		}
	}
}
