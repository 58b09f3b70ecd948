package pluginproto

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Harden keeps PINs and keys of this process out of core dumps, and other processes
// of the same user from attaching to it: prctl(2), PR_SET_DUMPABLE. Call it before any
// secret arrives. [Serve] does, and kmsd does for itself; children inherit the limit
// but not the rest.
func Harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbidding core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("making the process undumpable: %w", err)
	}
	return nil
}
