package group

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// Lease takes the group's key management for the caller alone. release may be
// called more than once.
func (g *Group) Lease(ctx context.Context) (release func(), err error) {
	select {
	case g.lease <- struct{}{}:
		return sync.OnceFunc(func() { <-g.lease }), nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for the key management of group %s: %w", g.cfg.Name, ctx.Err())
	}
}

// OnPrimary runs fn on the primary, and on the next member when the member it ran
// on fails with ClassMember, or fn with [ErrPassed]. It returns the member on which fn succeeded. An
// abandoned call may yet have its effect on the member that failed, so fn should
// name what it makes anew each time it is called.
func (g *Group) OnPrimary(ctx context.Context, fn func(ctx context.Context, m Member) error) (member string, err error) {
	var tried set
	var last error
	for {
		h, err := g.awaitPrimary(ctx, tried, last)
		if err != nil {
			return "", err
		}
		err = fn(ctx, h)
		if err == nil {
			return h.Name(), nil
		}
		if ctx.Err() != nil || !(faultOf(err, h.Name()) || errors.Is(err, ErrOccupied) || errors.Is(err, ErrPassed)) {
			return "", err
		}
		tried.add(h.l.m)
		last = err
	}
}

// faultOf reports whether an error says that the named member is no good now.
func faultOf(err error, name string) bool {
	var e *MemberError
	return errors.As(err, &e) && e.Member == name && pluginproto.ClassOf(e.Err) == pluginproto.ClassMember
}

// awaitPrimary returns the primary among those not tried. When there is none it
// waits a moment for one that is just coming back, tried or not.
func (g *Group) awaitPrimary(ctx context.Context, tried set, last error) (*handle, error) {
	var patience <-chan time.Time
	for {
		g.mu.Lock()
		if g.closed {
			g.mu.Unlock()
			return nil, ErrClosed
		}
		if m := g.primaryLocked(tried); m != nil {
			h := &handle{g: g, l: m.link, st: m.link.stint}
			g.mu.Unlock()
			return h, nil
		}
		if last != nil || !g.returningLocked(time.Now()) {
			defer g.mu.Unlock()
			if g.state != api.GroupLost && last != nil && (errors.Is(last, ErrOccupied) || errors.Is(last, ErrBarred) || errors.Is(last, ErrPassed)) {
				return nil, last
			}
			return nil, g.lossLocked(last)
		}
		changed := g.changed
		g.mu.Unlock()
		if patience == nil {
			patience = time.After(grace)
		}
		select {
		case <-changed:
		case <-patience:
			g.mu.Lock()
			defer g.mu.Unlock()
			return nil, g.lossLocked(nil)
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for a member of group %s: %w", g.cfg.Name, ctx.Err())
		}
	}
}

// OnEach runs fn on each of the named members, or on all that are in step when
// names is nil, in parallel. The answer has an entry for each of them, nil when fn
// succeeded; a member that is not in step has [ErrNotInStep].
func (g *Group) OnEach(ctx context.Context, names []string, fn func(ctx context.Context, m Member) error) map[string]error {
	if names == nil {
		for _, m := range g.InStep() {
			names = append(names, m.Name())
		}
	}
	var (
		mu      sync.Mutex // guards results
		results = make(map[string]error, len(names))
		wg      sync.WaitGroup
	)
	for _, name := range slices.Compact(slices.Sorted(slices.Values(names))) {
		wg.Go(func() {
			m, err := g.Member(name)
			if err == nil {
				err = fn(ctx, m)
			}
			mu.Lock()
			defer mu.Unlock()
			results[name] = err
		})
	}
	wg.Wait()
	return results
}

// Distrust takes a member out because what it holds cannot be right. It is connected
// anew, and whoever admits it has to find out.
func (g *Group) Distrust(name string, why error) {
	g.mu.Lock()
	var l *link
	if m := g.byName[name]; m != nil {
		l = m.link
	}
	g.mu.Unlock()
	if l != nil {
		g.drop(l, &pluginproto.Error{Class: pluginproto.ClassMember, Op: "trusting member " + name, Msg: why.Error()})
	}
}

// Names returns all members, in the order of their claim to be primary.
func (g *Group) Names() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	names := make([]string, len(g.members))
	for i, m := range g.members {
		names[i] = m.cfg.Name
	}
	return names
}

// InStep returns the members that hold what they should, active ones first, so
// that the primary is the first of all.
func (g *Group) InStep() []Member {
	g.mu.Lock()
	defer g.mu.Unlock()
	var in []Member
	for _, state := range []api.MemberState{api.MemberActive, api.MemberStandby} {
		for _, m := range g.members {
			if m.state == state {
				in = append(in, &handle{g: g, l: m.link, st: m.link.stint})
			}
		}
	}
	return in
}

// Member returns one member that is in step, else [ErrNotInStep] or [ErrUnknownMember].
func (g *Group) Member(name string) (Member, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	m := g.byName[name]
	if m == nil {
		return nil, &MemberError{Member: name, Err: ErrUnknownMember}
	}
	if m.state != api.MemberActive && m.state != api.MemberStandby {
		return nil, &MemberError{Member: name, Err: ErrNotInStep}
	}
	return &handle{g: g, l: m.link, st: m.link.stint}, nil
}
