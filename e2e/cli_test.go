package e2e_test

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"kmsd/e2e/look"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
)

func TestCommandLine(t *testing.T) {
	s := start(t)
	plain := random(32)
	encoded := base64.StdEncoding.EncodeToString(plain)

	must := func(stdin string, args ...string) string {
		t.Helper()
		out, errs, code := kmsd(t, s, stdin, args...)
		if code != 0 {
			t.Fatalf("kmsd %v: exit code %d: %s", args, code, errs)
		}
		return strings.TrimSpace(out)
	}
	must("", "key", "create", "shop")
	wrapped := must(encoded, "wrap", "shop", "--aad", "table orders")
	if got := must(wrapped, "unwrap", "shop", "--aad", "table orders"); got != encoded {
		t.Errorf("unwrap gives %q, want %q", got, encoded)
	}
	must("", "key", "rotate", "shop")
	again := must(wrapped, "rewrap", "shop", "--aad", "table orders")
	if again == wrapped {
		t.Error("rewrap changed nothing")
	}
	if got := must(again, "unwrap", "shop", "--aad", "table orders"); got != encoded {
		t.Errorf("unwrap of the rewrapped gives %q, want %q", got, encoded)
	}
	raw := must(string(plain), "wrap", "shop", "--raw")
	if !strings.HasPrefix(raw, "KMSD") {
		t.Errorf("wrap --raw gives %q, which is no envelope", raw)
	}
	must("", "datakey", "shop", "--bytes", "16")
	must("", "key", "verify", "shop")
	if out := must("", "key", "list"); !strings.Contains(out, "shop") {
		t.Errorf("key list shows %q", out)
	}
	if out := must("", "status"); !strings.Contains(out, "hsm-a") || !strings.Contains(out, "active") {
		t.Errorf("status shows %q", out)
	}
	must("", "audit", "verify", configOf(t, s).Audit.File)

	failing := []struct {
		name, stdin string
		args        []string
		code        int
		says        string
	}{
		{"a usage error", "", []string{"wrap"}, 2, "usage"},
		{"an unknown command", "", []string{"frobnicate"}, 2, "unknown command"},
		{"a key that there is not", "", []string{"key", "show", "none"}, 5, "none"},
		{"a wrong aad", wrapped, []string{"unwrap", "shop", "--aad", "table people"}, 1, "corrupt"},
		{"a wrong token", "", []string{"key", "list", "--token", "wrong"}, 4, "unauthenticated"},
		{"nobody who listens", "", []string{"status", "--addr", "https://127.0.0.1:1"}, 3, "127.0.0.1:1"},
	}
	for _, tt := range failing {
		t.Run(tt.name, func(t *testing.T) {
			_, errs, code := kmsd(t, s, tt.stdin, tt.args...)
			if code != tt.code || !strings.Contains(strings.ToLower(errs), tt.says) {
				t.Errorf("exit code %d, %q; want %d and a message with %q", code, errs, tt.code, tt.says)
			}
		})
	}
}

func TestCheckNamesEveryFaultWithItsLine(t *testing.T) {
	s := start(t)
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	cfg := configOf(t, s)
	if err := os.Chmod(cfg.Groups[0].Members[2].PIN.File, 0o644); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.Dir, "kmsd.yaml")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(b), "driver: softhsm", "driver: hardhsm", 1) + "min_copys: 2\n"
	if err := os.WriteFile(path, []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	_, errs, code := runProgram(t, nil, "", filepath.Join(bin, "kmsd"), "check", "-c", path)
	t.Log(errs)
	if code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	for _, want := range []string{"hardhsm", "min_copys", filepath.Base(cfg.Groups[0].Members[2].PIN.File)} {
		line := regexp.MustCompile(`kmsd\.yaml:\d+: [^\n]*` + regexp.QuoteMeta(want))
		if !line.MatchString(errs) {
			t.Errorf("no line of the message names %s with its line in the file", want)
		}
	}
}

// badToken is a fault of a member's token that kmsd meets when it starts.
type badToken struct {
	name    string
	spoil   func(t *testing.T, s *devserver.Server, m look.Member)
	state   api.MemberState
	reasons []string
}

func TestAMemberThatCannotStartSaysWhy(t *testing.T) {
	tests := []badToken{
		{"its module is missing", func(t *testing.T, s *devserver.Server, m look.Member) {
			changeMember(t, s, m.Name, "module", "/nowhere/libsofthsm2.so")
		}, api.MemberFailed, []string{"/nowhere/libsofthsm2.so"}},
		{"its token is missing", func(t *testing.T, s *devserver.Server, m look.Member) {
			changeMember(t, s, m.Name, "token_label", "no-such-token")
		}, api.MemberDown, []string{"no-such-token"}}, // an HSM that is off comes back by itself
		{"two tokens have its label", func(t *testing.T, s *devserver.Server, m look.Member) {
			_, errs, code := runProgram(t, []string{"SOFTHSM2_CONF=" + m.Settings["softhsm_conf"]}, "", "/usr/bin/softhsm2-util",
				"--init-token", "--free", "--label", m.Settings["token_label"], "--pin", "1234", "--so-pin", "1234")
			if code != 0 {
				t.Fatal(errs)
			}
		}, api.MemberFailed, []string{"label", "token_serial"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := start(t)
			if err := s.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			cfg := configOf(t, s)
			m := cfg.Groups[0].Members[1]
			tt.spoil(t, s, m)
			// "kmsd dev" would mend its own configuration, so it is served as it is.
			s = serve(t, s)
			c := dial(t, s)
			failed := awaitMember(t, c, m.Name, recoveredIn, func(m api.Member) bool { return m.State == tt.state && saysAll(m.Reason, tt.reasons) })
			t.Logf("the reason: %s", failed.Reason)
			awaitOthers(t, c, m.Name)
			createKey(t, c, "made-by-the-others")
		})
	}
}

func saysAll(text string, words []string) bool {
	return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(text, w) })
}

// changeMember gives a member of kmsd.yaml another setting.
func changeMember(t *testing.T, s *devserver.Server, member, setting, value string) {
	t.Helper()
	path := filepath.Join(s.Dir, "kmsd.yaml")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var cfg map[string]any
	if err := yaml.Unmarshal(b, &cfg); err != nil {
		t.Fatal(err)
	}
	for _, m := range cfg["groups"].([]any)[0].(map[string]any)["members"].([]any) {
		if m := m.(map[string]any); m["name"] == member {
			m["settings"].(map[string]any)[setting] = value
		}
	}
	if b, err = yaml.Marshal(cfg); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
