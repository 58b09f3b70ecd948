// Package softhsmtest answers: where does a test get a SoftHSM token?
//
// Tokens live in a directory of the test's own and vanish with it. A machine without
// SoftHSM fails the test with a sentence that says how to install it; nothing is
// skipped.
package softhsmtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
)

// PIN and SOPIN are those of every token made here. They guard nothing.
const (
	PIN   = "1234-user"
	SOPIN = "5678-officer"
)

const install = "install SoftHSM 2 (Debian: apt-get install softhsm2)"

// modules is where distributions put the library.
var modules = [...]string{
	"/usr/lib/softhsm/libsofthsm2.so",
	"/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
	"/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
	"/usr/lib64/libsofthsm2.so",
	"/usr/local/lib/softhsm/libsofthsm2.so",
	"/opt/homebrew/lib/softhsm/libsofthsm2.so",
}

// Module returns the path of SoftHSM's library.
func Module(t testing.TB) string {
	t.Helper()
	for _, path := range modules {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	t.Fatalf("no SoftHSM library at any of %v: %s", modules, install)
	return ""
}

// SoftHSM waits for the disk (fsync) at each change of a token, and tests for little else on
// a machine whose disk is busy. No test takes the power away, so that tokens are kept in
// memory where there is room.
const (
	memory     = "/dev/shm" // Linux's, and a process that is killed loses nothing that is in it
	memoryRoom = 1 << 30    // bytes that have to be free; a container may have 64 MiB in all
)

// Store is a directory of tokens with its own configuration file.
type Store struct {
	Conf string // path of softhsm2.conf; the tokens are at tokens beside it
	dir  string // where they are

	mu sync.Mutex // SoftHSM's tool does not like to run twice in one store
}

// NewStore makes an empty store.
func NewStore(t testing.TB) *Store {
	t.Helper()
	dir := newDir(t, "")
	s := &Store{Conf: filepath.Join(dir, "softhsm2.conf"), dir: filepath.Join(dir, "tokens")}
	if hasRoom(memory) {
		s.dir = newDir(t, memory)
		if err := os.Symlink(s.dir, filepath.Join(dir, "tokens")); err != nil {
			t.Fatal(err)
		}
	} else if err := os.Mkdir(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	conf := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n", s.dir)
	if err := os.WriteFile(s.Conf, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// newDir makes a directory under another one that vanishes with the test.
func newDir(t testing.TB, under string) string {
	t.Helper()
	// Not t.TempDir: SoftHSM cannot read a path with an equals sign, which the name
	// of a test may bring in.
	dir, err := os.MkdirTemp(under, "softhsm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("removing the tokens: %v", err)
		}
	})
	return dir
}

// hasRoom reports whether there is such a directory that many tokens may be made in.
func hasRoom(dir string) bool {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err != nil {
		return false
	}
	const write = 2 // W_OK
	return uint64(fs.Bavail)*uint64(fs.Bsize) >= memoryRoom && syscall.Access(dir, write) == nil
}

// Add makes a token with a label in the store, with [PIN] and [SOPIN].
func (s *Store) Add(t testing.TB, label string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	tool, err := exec.LookPath("softhsm2-util")
	if err != nil {
		t.Fatalf("no softhsm2-util: %s", install)
	}
	// The PIN is on a command line here, as it never is outside of tests.
	cmd := exec.CommandContext(t.Context(), tool, "--module", Module(t), "--init-token", "--free",
		"--label", label, "--pin", PIN, "--so-pin", SOPIN)
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+s.Conf)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("making the token %s: %v\n%s", label, err, out)
	}
}

// Wipe removes every token of the store, as if the HSMs had been pulled out.
func (s *Store) Wipe(t testing.TB) {
	t.Helper()
	if err := os.RemoveAll(s.dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
}

// NewToken makes a store with one token and returns the path of its
// configuration and the user PIN.
func NewToken(t testing.TB, label string) (conf, pin string) {
	t.Helper()
	s := NewStore(t)
	s.Add(t, label)
	return s.Conf, PIN
}
