package chaos_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// disk is a folder that can be full.
type disk struct {
	path  string
	small bool // it is a file system of its own; else it never fills
}

// diskSize has room for the keys of a long run.
const diskSize = "24m"

// newDisk mounts a small file system in memory, where that is allowed. Elsewhere the
// faults that fill a disk do nothing, which the log says.
func newDisk(t *testing.T, path string) disk {
	t.Helper()
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	unmount, err := mount(path, diskSize)
	if err != nil {
		t.Logf("no disk will be full: mounting a file system needs root on Linux: %v", err)
		return disk{path: path}
	}
	t.Cleanup(func() {
		if err := unmount(); err != nil {
			t.Errorf("unmounting %s: %v", path, err)
		}
	})
	return disk{path: path, small: true}
}

// fill leaves no room on the disk, and returns what makes room again.
func (d disk) fill() (free func() error, err error) {
	if !d.small {
		return func() error { return nil }, nil
	}
	path := filepath.Join(d.path, "filler")
	free = func() error { return os.Remove(path) }
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for block := make([]byte, 64<<10); ; {
		_, err := f.Write(block)
		switch {
		case err == nil:
		case !errors.Is(err, syscall.ENOSPC):
			return free, fmt.Errorf("filling %s: %w", d.path, err)
		case len(block) == 1:
			return free, nil
		default:
			block = block[:len(block)/2]
		}
	}
}

// copyDriver puts the driver that can misbehave at a path, and returns its sum.
func copyDriver(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(bin, "chaos-driver"))
	if err != nil {
		t.Fatal(err)
	}
	// Another run's may still be there; it is the same.
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		if err := os.WriteFile(path, b, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// move takes a token to another folder and tells SoftHSM in its configuration.
func move(t *testing.T, from, to, conf string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n", to)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
