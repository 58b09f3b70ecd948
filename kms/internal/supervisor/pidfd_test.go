package supervisor_test

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openProcess returns a descriptor of a process, which is readable when it has
// ended, whoever its parent is.
func openProcess(t *testing.T, pid int) int {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func wantEnded(t *testing.T, fd int, within time.Duration) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		left := time.Until(deadline).Milliseconds()
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(max(left, 0)))
		switch {
		case err == unix.EINTR:
			continue
		case n != 1:
			t.Fatalf("the process is still there after %v (%v)", within, err)
		}
		return
	}
}
