package daemon

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// harden keeps plaintext and PINs in this process out of core dumps, and other
// processes of the same user from attaching to it. prctl(2), PR_SET_DUMPABLE. The
// drivers do the same for themselves.
func harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbidding core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("making the process undumpable: %w", err)
	}
	return nil
}
