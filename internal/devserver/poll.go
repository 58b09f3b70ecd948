package devserver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kmsd/kms/api"
)

// Poll calls check until it returns nil. When ctx ends first, the error says what
// check still had against it. A [Final] error ends it at once.
func Poll(ctx context.Context, check func() error) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := check()
		var final finalError
		switch {
		case err == nil:
			return nil
		case errors.As(err, &final):
			return final.error
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: still: %w", ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// Final marks an error that waiting will not mend.
func Final(err error) error { return finalError{err} }

type finalError struct{ error }

// AllActive says what keeps a group from being whole: a member that is not in step
// or a key that is missing somewhere. It is nil when there is nothing.
func AllActive(g api.Group) error {
	if len(g.Members) == 0 {
		return errors.New("the group has no members")
	}
	for _, m := range g.Members {
		switch {
		case m.State != api.MemberActive && m.State != api.MemberStandby:
			return fmt.Errorf("member %s is %s (%s)", m.Name, m.State, m.Reason)
		case m.Missing > 0 || m.Keys < g.Keys:
			return fmt.Errorf("member %s holds %d of %d keys, %d missing", m.Name, m.Keys, g.Keys, m.Missing)
		}
	}
	return nil
}

// Member returns the named member of a group.
func Member(g api.Group, name string) (api.Member, error) {
	for _, m := range g.Members {
		if m.Name == name {
			return m, nil
		}
	}
	return api.Member{}, fmt.Errorf("group %s has no member %s", g.Name, name)
}
