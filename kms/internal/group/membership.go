package group

import (
	"context"
	"errors"
)

// errNotYet is the answer of what is still to be written.
var errNotYet = errors.New("not there yet")

// Add takes a member into a running group. It returns when the member's first
// attempt has ended; when that failed, the group is as it was before. The member
// comes last in the order of the claim to be primary.
func (g *Group) Add(ctx context.Context, cfg MemberConfig) error { return errNotYet }

// Remove drains a member, waits for its commands and calls, lets its driver log out
// and forgets the member. ErrLastActive: nobody else serves; force removes it all the
// same. When ctx ends during the drain the member is removed with what it still has
// in flight, which goes elsewhere as at a failure.
func (g *Group) Remove(ctx context.Context, name string, force bool) error { return errNotYet }

// Replace gives a member another configuration under its name: what it has in
// flight is finished, its driver ends, and the new one is connected. It returns how
// the first attempt ended. After a failure the member stays, as one that is away.
func (g *Group) Replace(ctx context.Context, cfg MemberConfig) error { return errNotYet }

// Drain takes a member out of choice and returns when nothing is in flight on it any
// more. It stays out until Resume or Recover; when its driver ends meanwhile it is not
// connected anew.
func (g *Group) Drain(ctx context.Context, name string, force bool) error { return errNotYet }

// Resume ends a drain: the member is brought in step and serves. It returns how that
// ended. A member that is not drained needs nothing.
func (g *Group) Resume(ctx context.Context, name string) error { return errNotYet }

// SetStandby makes a member a standby or an active one.
func (g *Group) SetStandby(name string, standby, force bool) error { return errNotYet }

// Reinitialize makes an attempt for every member that is away now, also for those that
// have been given up, and returns when each has ended. The errors are by member.
func (g *Group) Reinitialize(ctx context.Context) map[string]error { return nil }

// Readmit has a member that is in step compared and admitted again on its present
// connection, without taking it out of service first, and returns how that ended.
func (g *Group) Readmit(ctx context.Context, name string) error { return errNotYet }
