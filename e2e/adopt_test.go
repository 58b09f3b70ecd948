package e2e_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"kmsd/e2e/look"
	"kmsd/internal/softhsmtest"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// Somebody else's program makes a key on the token of one member, while kmsd has it
// open too.
func TestAKeyThatSomebodyElseHasMadeIsAdopted(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	g := group(t, c)
	members := g.Members
	other := openToken(t, configOf(t, s), members[0].Name)
	made, err := other.Generate(t.Context(), pluginproto.KeySpec{ID: pluginproto.KeyID{1, 2, 3}, Type: pluginproto.AES256, Label: "till"})
	if err != nil {
		t.Fatal(err)
	}
	report, err := c.Sync(t.Context(), g.Name, api.SyncOptions{})
	if err != nil || len(report.Members[0].Foreign) != 1 || report.Members[0].Foreign[0].Identity != made.ID.String() {
		t.Fatalf("the key is not reported: %+v, %v", report, err)
	}
	report, err = c.Sync(t.Context(), g.Name, api.SyncOptions{Adopt: true})
	if err != nil || fmt.Sprint(report.Adopted) != "[till]" {
		t.Fatalf("the key is not adopted: %+v, %v", report, err)
	}
	v, err := c.Verify(t.Context(), "till")
	if err != nil || !v.OK || len(v.Copies) != len(members) {
		t.Errorf("it does not verify: %+v, %v", v, err)
	}
	plain := []byte("a data key")
	for range 10 { // every member has its turn
		wrapped := wrap(t, c, "till", plain, nil)
		if got, err := c.Unwrap(t.Context(), "till", wrapped, nil); err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("unwrapped %q, %v", got, err)
		}
	}
	check, err := c.Check(t.Context(), g.Name)
	if err != nil || !check.OK {
		t.Errorf("the group is not sound after that: %+v, %v", check, err)
	}
}

// As an operator makes keys by hand: with pkcs11-tool, which gives them attributes of
// its own and leaves it to --extractable whether a key may ever leave its token.
func TestKeysOfPkcs11ToolAreAdoptedIfTheyMayLeaveTheirToken(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	g := group(t, c)
	cfg := configOf(t, s)
	loose, fast := pluginproto.KeyID{1}, pluginproto.KeyID{2}
	for _, m := range cfg.Groups[0].Members {
		if m.Name == g.Members[0].Name {
			keygen(t, m, loose, "loose", "--sensitive", "--extractable")
			keygen(t, m, fast, "fast", "--sensitive")
		}
	}
	report, err := c.Sync(t.Context(), g.Name, api.SyncOptions{Adopt: true})
	if err != nil || fmt.Sprint(report.Adopted) != "[loose]" {
		t.Fatalf("adopted %v, %v", report.Adopted, err)
	}
	why := map[string]string{} // :: label → why it was not adopted
	for _, o := range report.Members[0].Foreign {
		why[o.Label] = o.Refused
	}
	if why["loose"] != "" || !strings.Contains(why["fast"], "CKA_EXTRACTABLE is false") {
		t.Errorf("what is said of the two: %q", why)
	}
	plain := []byte("a data key")
	for range 10 { // every member has its turn
		wrapped := wrap(t, c, "loose", plain, nil)
		if got, err := c.Unwrap(t.Context(), "loose", wrapped, nil); err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("unwrapped %q, %v", got, err)
		}
	}
	allVerify(t, c)
}

func keygen(t *testing.T, m look.Member, id pluginproto.KeyID, label string, flags ...string) {
	t.Helper()
	args := append([]string{"--module", softhsmtest.Module(t), "--token-label", m.Settings["token_label"],
		"--login", "--pin", string(readSecret(t, m.PIN.File)), "--keygen", "--key-type", "AES:32", "--id", id.String(), "--label", label}, flags...)
	if _, errs, code := runProgram(t, []string{"SOFTHSM2_CONF=" + m.Settings["softhsm_conf"]}, "", "/usr/bin/pkcs11-tool", args...); code != 0 {
		t.Fatalf("pkcs11-tool: exit code %d: %s", code, errs)
	}
}
