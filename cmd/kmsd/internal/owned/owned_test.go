package owned_test

import (
	"os"
	"path/filepath"
	"testing"

	"kmsd/cmd/kmsd/internal/owned"
)

func TestByUs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ours := func(path string) bool {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return owned.ByUs(info)
	}
	if !ours(path) {
		t.Error("our own file is not ours")
	}
	if !ours("/") {
		t.Error("what belongs to root counts as another's")
	}
	if os.Geteuid() != 0 {
		return // only root can give a file away
	}
	if err := os.Chown(path, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if ours(path) {
		t.Error("another's file is ours")
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := owned.Advice(info); got != "if that is the user of kmsd, run this as it: sudo -u nobody; if not, chown it" {
		t.Errorf("the advice is %q", got)
	}
}
