package pluginproto

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// harden keeps PINs and keys of this process out of core dumps, and other processes
// of the same user from attaching to it. It is called before any secret arrives.
func harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbidding core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("making the process undumpable: %w", err)
	}
	return nil
}
