package boltcat

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
)

func holderPath(path string) string { return path + ".pid" }

// sayHolder writes who has the catalog, for the message that another process
// gets. It is best effort: the lock does not depend on it. It must be called with
// the lock held.
func sayHolder(path string) {
	name := holderPath(path)
	_ = os.Remove(name) // it may be left from a process of another user
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return
	}
	_, _ = fmt.Fprintln(f, os.Getpid())
	_ = f.Close()
}

// forgetHolder undoes sayHolder. It must be called with the lock held.
func forgetHolder(path string) { _ = os.Remove(holderPath(path)) }

// holder names the process that has the catalog, as well as it is known.
func holder(path string) string {
	f, err := os.OpenFile(holderPath(path), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "another process"
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 32))
	if err != nil {
		return "another process"
	}
	pid, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 31)
	if err != nil {
		return "another process"
	}
	if pid == uint64(os.Getpid()) {
		return "this process"
	}
	return fmt.Sprintf("process %d", pid)
}
