package luna_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"kmsd/plugins/luna/lunasim"
)

// Masked keys can be kept in a file and come back to partitions with the same masking key.
func TestMaskedKeysAreBackedUpAndRestored(t *testing.T) {
	s := start(t, lunasim.Options{Kind: "sim"}, lunasim.Options{Kind: "sim"})
	s.create("shop", "")
	s.create("signer", "ec-p256")
	plain := random(32)
	wrapped, err := s.c.Wrap(t.Context(), "shop", plain, nil)
	if err != nil {
		t.Fatal(err)
	}
	before := s.sameKeys(2)
	recipient, identity := ageKey(t)
	file := filepath.Join(s.dir, "keys.backup")
	run := func(args ...string) {
		t.Helper()
		if out, errs, code := s.cli(args...); code != 0 {
			t.Fatalf("%v ends with %d:\n%s%s", args, code, out, errs)
		}
	}
	run("backup", "create", file, "--recipient", recipient)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	searchFor(t, "the backup", b, formsOf(before))

	if err := s.server.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}

	fresh := newSite(t)
	for _, name := range []string{"hsm-x", "hsm-y"} {
		fresh.members = append(fresh.members, on(name, lunasim.New(t, lunasim.Options{Kind: "sim"})))
	}
	fresh.write()
	config := filepath.Join(fresh.dir, "kmsd.yaml")
	run("backup", "verify", file, "--identity", identity, "-c", config)
	run("backup", "restore", file, "--identity", identity, "-c", config)
	fresh.serve()
	fresh.awaitWhole()
	after := fresh.sameKeys(2)
	for id, value := range before {
		if string(after[id]) != string(value) {
			t.Errorf("the bytes of %s are not what they were", id)
		}
	}
	if got, err := fresh.c.Unwrap(t.Context(), "shop", wrapped, nil); err != nil || string(got) != string(plain) {
		t.Errorf("unwrapping after the restore: %v", err)
	}
}

// Luna's cloning protocols need both HSMs, so there is nothing to keep.
func TestClonedKeysAreNotBackedUp(t *testing.T) {
	s := start(t, lunasim.Options{}, lunasim.Options{})
	s.create("shop", "")
	recipient, _ := ageKey(t)
	file := filepath.Join(s.dir, "keys.backup")
	_, errs, code := s.cli("backup", "create", file, "--recipient", recipient)
	t.Logf("%s", errs)
	if code != 1 || !strings.Contains(errs, "cpv4") {
		t.Errorf("it ends with %d, and says %q; want 1 and the protocol", code, errs)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("a file is left")
	}
}

// ageKey makes a recipient, and a file with its identity.
func ageKey(t *testing.T) (recipient, identity string) {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	identity = filepath.Join(t.TempDir(), "identity")
	if err := os.WriteFile(identity, []byte(id.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return id.Recipient().String(), identity
}
