package group

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// maxMembers is the largest group, as with Luna (CK_HA_MAX_MEMBERS).
const maxMembers = 32

// Conn is an opened driver and the means to be rid of it. It belongs to the
// group from the moment Connect returns it. Close is called when the group is
// closed, at most once, and followed by Kill.
type Conn interface {
	pluginproto.Driver

	// Done is closed when the driver has ended.
	Done() <-chan struct{}

	// Kill ends the driver at once and without its help. It may be called more than
	// once and does not wait for what the HSM is doing.
	Kill()

	// PID is the driver's process, 0 when it has none.
	PID() int
}

// A Conn may also tell when it last heard from its driver, an answer or a
// heartbeat. A member that still sends heartbeats is not dropped for being silent.
type hearer interface {
	LastHeard() time.Time
}

// MemberConfig describes one member.
type MemberConfig struct {
	Name    string
	Driver  string // shown in Status
	Standby bool   // in step, but serves only when no active member is left
	Drained bool   // begins as a member that was drained: it is connected when the drain ends

	// Connect starts the driver and opens its token. It is called again for every
	// recovery, never twice at a time. When it fails it has cleaned up. An error
	// that is a [pluginproto.Error] with Permanent set makes the member failed:
	// Connect is then called only once per Recovery.Interval, and has to find out
	// cheaply whether anything has changed.
	Connect func(ctx context.Context) (Conn, pluginproto.TokenInfo, error)
}

// Recovery says how a lost member is brought back.
type Recovery struct {
	Manual   bool          // only when Recover is called
	Interval time.Duration // longest pause between two attempts; zero means 60 s
	Retries  int           // attempts before giving up; zero and less mean never
}

// Config is what New needs. It is copied.
type Config struct {
	Name      string
	MinCopies int // shown in Status; the group itself keeps no keys

	// CommandTimeout drops a member that has neither answered nor sent a heartbeat
	// for this long. Zero means 20 s.
	CommandTimeout time.Duration

	// ProbeInterval is the longest time a member may go without a successful
	// command before it is asked to prove itself, and the longest time it may owe an
	// answer before commands are moved elsewhere. Zero means 2 s.
	ProbeInterval time.Duration

	// Hedge sends a slow command to a second member too, within a budget, and at once
	// all those of a member that seems to hang.
	Hedge bool
	// PlainCount makes every command count the same when a member is chosen, as with
	// Luna, whatever it costs. For comparison.
	PlainCount bool
	Recovery   Recovery
	Members    []MemberConfig // in the order of their claim to be primary, 1 to 32

	// Admit brings a member in step with what it should hold. It is called twice for
	// each admission: first with last false, without the lease, to do the bulk of
	// the work while keys may still be made and destroyed; then with last true,
	// under the lease, to find what changed meanwhile. The member enters the group
	// before that lease is given back, so no key operation can fall between the last
	// look and the admission. An error ends the attempt, and the recovery goes on; a
	// permanent one makes the member failed. ctx ends when the member stops
	// answering. What it returns counts when last is true. Nil: nothing to do.
	Admit func(ctx context.Context, m Member, last bool) (Admission, error)

	// Logger gets what is no event. Nil means silence.
	Logger hclog.Logger

	// OnEvent gets every transition, in order, one at a time, from a goroutine of
	// the group's. Nil means nobody listens.
	OnEvent func(api.Event)
}

// Admission is what Admit has found out about a member that may serve.
type Admission struct {
	// Barred are identities that this member must not be asked for, because its copies
	// are not what they should be. Commands for them go to other members.
	Barred []pluginproto.KeyID
}

// checked returns a copy of c with its zero values replaced, or all its faults.
func (c Config) checked() (Config, error) {
	c.Members = slices.Clone(c.Members)
	if c.CommandTimeout == 0 {
		c.CommandTimeout = 20 * time.Second
	}
	if c.ProbeInterval == 0 {
		c.ProbeInterval = 2 * time.Second
	}
	if c.Recovery.Interval == 0 {
		c.Recovery.Interval = time.Minute
	}
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	if c.OnEvent == nil {
		c.OnEvent = func(api.Event) {}
	}
	if c.Admit == nil {
		c.Admit = func(context.Context, Member, bool) (Admission, error) { return Admission{}, nil }
	}
	return c, c.faults()
}

func (c Config) faults() error {
	var errs []error
	fault := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("group %q: "+format, append([]any{c.Name}, args...)...))
	}
	if n := len(c.Members); n < 1 || n > maxMembers {
		fault("has %d members, want 1 to %d", n, maxMembers)
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"command timeout", c.CommandTimeout}, {"probe interval", c.ProbeInterval}, {"recovery interval", c.Recovery.Interval}} {
		if d.value < 0 {
			fault("%s is negative: %v", d.name, d.value)
		}
	}
	seen := make(map[string]bool, len(c.Members))
	for i, m := range c.Members {
		if err := m.fault(i + 1); err != nil {
			fault("%w", err)
		} else if seen[m.Name] {
			fault("two members are named %q", m.Name)
		}
		seen[m.Name] = true
	}
	return errors.Join(errs...)
}

// fault returns what is wrong with the nth member.
func (m MemberConfig) fault(n int) error {
	switch {
	case m.Name == "":
		return fmt.Errorf("member %d has no name", n)
	case m.Connect == nil:
		return fmt.Errorf("member %q has no way to connect", m.Name)
	}
	return nil
}
