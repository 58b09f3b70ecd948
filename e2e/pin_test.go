package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"kmsd/e2e/look"
	"kmsd/internal/devserver"
	"kmsd/internal/softhsmtest"
)

func TestAWrongPINNamesTheMemberAndLocksNothing(t *testing.T) {
	dir := t.TempDir()
	s := startIn(t, dir, "")
	c := dial(t, s)
	awaitWhole(t, c, recoveredIn)
	createKey(t, c, "shop")
	cfg := configOf(t, s)
	m := cfg.Groups[0].Members[1]
	right := readSecret(t, m.PIN.File)
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}

	const wrong = "734268-wrong"
	writePIN(t, m.PIN.File, []byte(wrong))
	s = startIn(t, dir, "")
	c = dial(t, s)
	failed := awaitMember(t, c, m.Name, recoveredIn, isFailed)
	t.Logf("the reason: %s", failed.Reason)
	if failed.CKR != "CKR_PIN_INCORRECT" || !strings.Contains(strings.ToLower(failed.Reason), "pin") {
		t.Errorf("the member shows %s, %q; want CKR_PIN_INCORRECT and a reason that says PIN", failed.CKR, failed.Reason)
	}
	awaitOthers(t, c, m.Name)
	createKey(t, c, "made-without-it")

	// The same wrong PIN is not tried again, not even when an operator asks for it.
	for range 5 {
		c.Recover(t.Context(), "default", m.Name) // whether it is refused or in vain
	}
	awaitMember(t, c, m.Name, recoveredIn, isFailed)
	var log []byte
	await(t, recoveredIn, func(ctx context.Context) error { // the log may be a line behind the status
		return devserver.Poll(ctx, func() (err error) {
			log, err = os.ReadFile(s.Log)
			if err == nil && (!bytes.Contains(log, []byte(m.Name)) || !bytes.Contains(log, []byte("CKR_PIN_INCORRECT"))) {
				err = errors.New("the log does not name the member and CKR_PIN_INCORRECT")
			}
			return err
		})
	})
	if bytes.Contains(log, []byte(wrong)) || bytes.Contains(log, right) {
		t.Error("a PIN is in the log")
	}
	checkNotLocked(t, m)

	// A corrected file is enough; kmsd goes on running.
	writePIN(t, m.PIN.File, right)
	if err := c.Recover(t.Context(), "default", m.Name); err != nil {
		t.Errorf("recovering: %v", err)
	}
	awaitWhole(t, c, recoveredIn)
	allVerify(t, c)
}

func writePIN(t *testing.T, path string, pin []byte) {
	t.Helper()
	if err := os.WriteFile(path, append(bytes.Clone(pin), '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
}

// checkNotLocked asks the token itself, with a tool that is not ours.
func checkNotLocked(t *testing.T, m look.Member) {
	t.Helper()
	out, errs, code := runProgram(t, []string{"SOFTHSM2_CONF=" + m.Settings["softhsm_conf"]}, "", "/usr/bin/pkcs11-tool",
		"--module", softhsmtest.Module(t), "--list-token-slots")
	if code != 0 {
		t.Fatalf("pkcs11-tool: exit code %d: %s", code, errs)
	}
	if !strings.Contains(out, m.Settings["token_label"]) {
		t.Fatalf("pkcs11-tool does not show token %s:\n%s", m.Settings["token_label"], out)
	}
	for _, bad := range []string{"user PIN locked", "final user PIN try"} {
		if strings.Contains(out, bad) {
			t.Errorf("the token says: %s\n%s", bad, out)
		}
	}
}
