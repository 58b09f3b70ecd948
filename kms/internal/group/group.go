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
	"sync"
	"sync/atomic"
	"time"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

const (
	// startWait is how long Start waits for the first attempts.
	startWait = 10 * time.Second
	// startGrace is how long it waits for the others when a member serves already:
	// one HSM that hangs must not keep those that do not from serving.
	startGrace = 2 * time.Second
)

// Group is a group of HSMs. All methods may be called concurrently.
type Group struct {
	cfg   Config
	lease chan struct{} // holds one token while somebody has the lease
	told  chan struct{} // wakes announce
	quiet chan struct{} // closed when no event can come any more

	ctx   context.Context // ends with Close; every member's is made from it
	stop  func()
	tasks sync.WaitGroup // owners, watchers and calls to drivers
	heard sync.WaitGroup // announce
	jobs  chan job       // to carriers that are idle
	idle  atomic.Int32   // how many are

	mu       sync.Mutex                 // guards what follows and all of member; held for moments, never over a call
	members  []*member                  // in the order of the configuration, then of joining; never changed in place
	byName   map[string]*member         // :: name → member
	leaving  map[string]<-chan struct{} // :: name → closed when the last one of that name that has left is gone
	started  bool
	closed   bool
	state    api.GroupState
	lossTold bool          // somebody was told of the present loss of all members
	changed  chan struct{} // closed and replaced when a member's state changes
	turn     int           // where the next round robin begins
	hedge    hedger
	events   []api.Event
}

// New makes a group. It does nothing until Start.
func New(cfg Config) (*Group, error) {
	cfg, err := cfg.checked()
	if err != nil {
		return nil, err
	}
	g := &Group{
		cfg:     cfg,
		byName:  make(map[string]*member, len(cfg.Members)),
		leaving: make(map[string]<-chan struct{}),
		lease:   make(chan struct{}, 1),
		told:    make(chan struct{}, 1),
		quiet:   make(chan struct{}),
		jobs:    make(chan job),
		state:   api.GroupLost,
		changed: make(chan struct{}),
		hedge:   newHedger(cfg.ProbeInterval),
	}
	for i, mc := range cfg.Members {
		m := newMember(mc, i)
		g.members = append(g.members, m)
		g.byName[mc.Name] = m
	}
	return g, nil
}

// Start connects all members and returns when each has had its first attempt, or
// 2 s after the first of them serves, or after 10 s, with whatever is there, even
// nothing: a member that is absent is recovered like any other. The group lives
// until Close; ctx ends only the wait.
func (g *Group) Start(ctx context.Context) error {
	g.mu.Lock()
	if g.started || g.closed {
		g.mu.Unlock()
		return ErrClosed
	}
	g.started = true
	life, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	g.ctx, g.stop = life, func() { stop(ErrClosed) }
	g.heard.Go(g.announce)
	var pending sync.WaitGroup
	for _, m := range g.members {
		pending.Add(1)
		g.liveLocked(m, nil, sync.OnceFunc(pending.Done))
	}
	attempted := make(chan struct{})
	g.tasks.Go(func() { // under the lock, for Close may come at once, and waits for it
		defer close(attempted)
		pending.Wait()
	})
	g.mu.Unlock()

	return g.awaitStart(ctx, attempted)
}

func (g *Group) awaitStart(ctx context.Context, attempted <-chan struct{}) error {
	late := time.NewTimer(startWait)
	defer late.Stop()
	var others <-chan time.Time // nil: nobody serves yet
	for {
		g.mu.Lock()
		changed, serves := g.changed, g.state != api.GroupLost
		g.mu.Unlock()
		if serves && others == nil {
			others = time.After(startGrace)
		}
		select {
		case <-changed:
		case <-attempted:
			return nil
		case <-others:
			return nil
		case <-late.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Close stops the group, lets its drivers log out, and waits for all that it
// started. It tells of no transition: nothing has happened to the members.
func (g *Group) Close() {
	g.mu.Lock()
	first := g.started && !g.closed
	g.closed = true
	if first {
		g.dismissLocked()
		g.stop()
	}
	g.mu.Unlock()
	g.tasks.Wait() // also when somebody else is closing it
	if first {
		close(g.quiet)
	}
	g.heard.Wait()
	if first {
		g.cfg.Logger.Info("group closed", "group", g.cfg.Name)
	}
}

// lookupLocked returns a member of a group that runs.
func (g *Group) lookupLocked(name string) (*member, error) {
	switch m := g.byName[name]; {
	case g.closed || !g.started:
		return nil, ErrClosed
	case m == nil:
		return nil, &MemberError{Member: name, Err: ErrUnknownMember}
	default:
		return m, nil
	}
}

// dismissLocked takes all members out of the group and wakes those who wait for one.
func (g *Group) dismissLocked() {
	now := time.Now()
	for _, m := range g.members {
		m.state, m.since, m.link = api.MemberDown, now, nil
		m.reason, m.ckr = ErrClosed.Error(), pluginproto.CKRTokenNotPresent
		m.answerLocked(ErrClosed)
	}
	g.state = api.GroupLost
	close(g.changed)
	g.changed = make(chan struct{})
}
