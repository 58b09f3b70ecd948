// Package group answers: which member serves now, and what if it fails?
//
// A [Group] is a set of HSMs that hold the same keys. To its caller it is one
// HSM that does not break: [Group.Do] runs a command on the least busy member and
// moves it when that member fails or falls silent; [Group.OnPrimary] and
// [Group.OnEach] run key operations on members by name, under the one
// [Group.Lease]. Behind that each member has one goroutine that owns its life:
// it connects, has the member brought in step, watches it, and starts again when
// it is lost.
package group

import (
	"context"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// Group is a group of HSMs. All methods may be called concurrently.
type Group struct {
	cfg Config
}

// New makes a group. It does nothing until Start.
func New(cfg Config) (*Group, error) {
	cfg, err := cfg.checked()
	if err != nil {
		return nil, err
	}
	return &Group{cfg: cfg}, nil
}

// Start connects all members and returns when each has had its first attempt, or
// after 10 s, with whatever is there, even nothing: a member that is absent is
// recovered like any other. The group lives until Close; ctx ends only the wait.
func (g *Group) Start(ctx context.Context) error { return nil }

// Close stops the group, kills its drivers and waits for all that it started.
func (g *Group) Close() {}

// Do runs a command on the least busy member, and on another one when that fails.
func (g *Group) Do(ctx context.Context, cmd pluginproto.Command) (pluginproto.Result, error) {
	return pluginproto.Result{}, ErrLost
}

// Lease takes the group's key management for the caller alone. release may be
// called more than once.
func (g *Group) Lease(ctx context.Context) (release func(), err error) { return func() {}, nil }

// OnPrimary runs fn on the primary, and on the next member when the member it ran
// on fails with ClassMember. It returns the member on which fn succeeded. An
// abandoned call may yet have its effect on the member that failed, so fn should
// name what it makes anew each time it is called.
func (g *Group) OnPrimary(ctx context.Context, fn func(ctx context.Context, m Member) error) (member string, err error) {
	return "", ErrLost
}

// OnEach runs fn on each of the named members, or on all that are in step when
// names is nil, in parallel. The answer has an entry for each of them, nil when fn
// succeeded; a member that is not in step has [ErrNotInStep].
func (g *Group) OnEach(ctx context.Context, names []string, fn func(ctx context.Context, m Member) error) map[string]error {
	return nil
}

// Names returns all members, in the order of the configuration.
func (g *Group) Names() []string { return nil }

// InStep returns the members that hold what they should, active and standby, the
// primary first.
func (g *Group) InStep() []Member { return nil }

// Member returns one member that is in step, else [ErrNotInStep] or [ErrUnknownMember].
func (g *Group) Member(name string) (Member, error) { return nil, ErrUnknownMember }

// Recover makes an attempt to bring a member back now and returns how it ended.
// When an attempt is under way it joins that one.
func (g *Group) Recover(ctx context.Context, name string) error { return ErrUnknownMember }

// SetHeld notes how many keys a member is known to hold and to lack, for Status.
func (g *Group) SetHeld(member string, keys, missing int) {}

// SetKeys notes how many keys there are, for Status.
func (g *Group) SetKeys(keys int) {}

// Status returns the truth about the group, from memory.
func (g *Group) Status() api.Group { return api.Group{} }
