package group

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

const (
	firstPause = 250 * time.Millisecond // before the second attempt; doubles after that
	flapPause  = 2 * time.Second        // longest pause before the first attempt, for a member that is lost again and again
	steady     = 10 * time.Second       // a link that lived this long was no flapping

	// connectTimeout bounds one Connect: a process start and a login.
	connectTimeout = 30 * time.Second
)

// own is the life of one member, and the only one that brings it back. Its turn
// comes by the clock or by Recover, so that both can never collide. It calls
// attempted after each attempt, and at the end, which may come before the first.
func (g *Group) own(m *member, attempted func()) {
	defer attempted()
	p := pace{interval: g.cfg.Recovery.Interval}
	for {
		var served time.Duration
		l, err := g.reach(m)
		if err == nil {
			served, err = g.tend(l, func(err error) {
				g.settle(m, err)
				attempted()
			})
		} else {
			g.settle(m, err)
			attempted()
		}
		p.note(served, err)
		if !g.awaitTurn(m, p) {
			g.settle(m, ErrClosed)
			return
		}
	}
}

// awaitTurn waits for the time of the next attempt, and reports false when the
// group is closed.
func (g *Group) awaitTurn(m *member, p pace) bool {
	if g.ctx.Err() != nil {
		return false
	}
	r := g.cfg.Recovery
	var turn <-chan time.Time
	var next time.Time
	switch {
	case r.Manual:
	case r.Retries > 0 && p.failures >= r.Retries:
		g.cfg.Logger.Warn("recovery has given up", "group", g.cfg.Name, "member", m.cfg.Name, "attempts", p.failures)
	default:
		pause := p.pause()
		timer := time.NewTimer(pause)
		defer timer.Stop()
		turn, next = timer.C, time.Now().Add(pause)
	}
	g.mu.Lock()
	m.nextTry = next
	g.mu.Unlock()
	select {
	case <-turn:
	case <-m.kick:
	case <-g.ctx.Done():
	}
	return g.ctx.Err() == nil // which may be over as well as what ended the wait
}

// reach connects a member and has its token do one real operation.
func (g *Group) reach(m *member) (*link, error) {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return nil, ErrClosed
	}
	m.attempts++
	m.nextTry = time.Time{}
	g.moveLocked(m, reached, nil)
	g.mu.Unlock()

	conn, token, err := g.connect(m)
	g.mu.Lock()
	switch {
	case g.closed:
		err = ErrClosed
	case err == nil:
		err = g.kinLocked(m, token)
	}
	if err != nil {
		g.moveLocked(m, lossOf(err), err)
		g.mu.Unlock()
		if conn != nil {
			conn.Kill()
		}
		return nil, err
	}
	defer g.mu.Unlock()
	l := g.newLink(m, conn, token)
	m.link, m.token = l, token
	g.moveLocked(m, opened, nil)
	return l, nil
}

// connect starts the driver and has its token do one real operation. The Conn may
// be there even when there is an error.
func (g *Group) connect(m *member) (Conn, pluginproto.TokenInfo, error) {
	ctx, cancel := context.WithTimeout(g.ctx, connectTimeout)
	defer cancel()
	conn, token, err := m.cfg.Connect(ctx)
	if err != nil {
		return nil, pluginproto.TokenInfo{}, err
	}
	if _, err := conn.Do(ctx, pluginproto.Command{Op: pluginproto.OpProbe}); err != nil {
		return conn, token, fmt.Errorf("probing for the first time: %w", err)
	}
	return conn, token, nil
}

// kinLocked refuses a token that cannot belong to the group.
func (g *Group) kinLocked(m *member, token pluginproto.TokenInfo) error {
	refuse := func(format string, args ...any) error {
		e := pluginproto.Errorf(pluginproto.ClassMember, "joining the group", format, args...)
		e.Permanent = true
		return e
	}
	for _, other := range g.members {
		if other == m || other.link == nil {
			continue
		}
		switch t := other.link.token; {
		case t.Serial != "" && t.Serial == token.Serial && t.Label == token.Label:
			return refuse("member %s has the same token (label %q, serial %s)", other.cfg.Name, t.Label, t.Serial)
		case !bytes.Equal(t.DomainCheck, token.DomainCheck):
			return refuse("its domain is not that of member %s: both need the same domain secret", other.cfg.Name)
		}
	}
	return nil
}

// tend watches a link and has its member admitted, again each time it answers
// after a silence, until the link is dropped. It tells tried how each admission
// ended. It returns for how long the member was in the group, 0 for
// never, and what ended the link.
func (g *Group) tend(l *link, tried func(error)) (served time.Duration, err error) {
	watched := make(chan struct{})
	g.tasks.Go(func() {
		defer close(watched)
		g.watch(l)
	})
	var entered time.Time
	for admit := true; l.ctx.Err() == nil; admit = g.renew(l) {
		if admit {
			err = g.admit(l)
			switch {
			case err == nil && entered.IsZero():
				entered = time.Now()
			case err != nil && l.stint.ctx.Err() == nil:
				g.drop(l, err)
			}
			tried(err)
		}
		select {
		case <-l.again:
		case <-l.ctx.Done():
		}
	}
	<-watched
	if !entered.IsZero() {
		served = max(time.Since(entered), 1)
	}
	return served, context.Cause(l.ctx)
}

// renew begins a new stint on a link that answers again. It reports false when
// there is no need.
func (g *Group) renew(l *link) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if l.dropped || l.ctx.Err() != nil || l.stint.ctx.Err() == nil {
		return false
	}
	l.stint = newStint(l)
	g.moveLocked(l.m, answered, nil)
	return true
}

// admit brings a member in step and lets it into the group. The lease is held
// from the last look until the member is in, so that whoever makes a key either
// is seen by that look or finds the member in step.
func (g *Group) admit(l *link) error {
	g.mu.Lock()
	st := l.stint
	g.mu.Unlock()
	h := &handle{g: g, l: l, st: st}
	if _, err := g.cfg.Admit(st.ctx, h, false); err != nil {
		return endOf(st.ctx, err)
	}
	release, err := g.Lease(st.ctx)
	if err != nil {
		return endOf(st.ctx, err)
	}
	defer release()
	found, err := g.cfg.Admit(st.ctx, h, true)
	if err != nil {
		return endOf(st.ctx, err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if st.ctx.Err() != nil {
		return context.Cause(st.ctx)
	}
	what := admitted
	if l.m.cfg.Standby {
		what = onStand
	}
	l.entered = true
	l.bar(found.Barred)
	l.m.attempts = 0
	g.moveLocked(l.m, what, nil)
	return nil
}

// endOf prefers the reason why a context ended to the error that this led to.
func endOf(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// settle tells those who asked for a recovery how the attempt ended.
func (g *Group) settle(m *member, err error) {
	g.mu.Lock()
	waiting := m.waiting
	m.waiting = nil
	select { // they asked for this attempt
	case <-m.kick:
	default:
	}
	g.mu.Unlock()
	for _, w := range waiting {
		w <- err
	}
}

// Recover makes an attempt to bring a member back now and returns how it ended.
// When an attempt is under way it joins that one. A member that is in step needs
// none; one that has stopped answering is given up and connected anew.
func (g *Group) Recover(ctx context.Context, name string) error {
	m := g.byName[name]
	if m == nil {
		return fmt.Errorf("recovering %q: %w", name, ErrUnknownMember)
	}
	done := make(chan error, 1)
	g.mu.Lock()
	l := m.link
	switch {
	case g.closed || !g.started:
		g.mu.Unlock()
		return ErrClosed
	case m.state == api.MemberActive || m.state == api.MemberStandby:
		g.mu.Unlock()
		return nil
	}
	m.waiting = append(m.waiting, done)
	silent := l != nil && l.stint.ctx.Err() != nil
	g.mu.Unlock()
	if silent {
		g.drop(l, &pluginproto.Error{Class: pluginproto.ClassMember, Op: "recovering", Msg: "given up for a new connection"})
	}
	wake(m.kick)
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("recovering %q: %w", name, ctx.Err())
	}
}

// pace says how long to wait before the next attempt.
type pace struct {
	interval  time.Duration
	failures  int  // attempts in a row that did not bring the member into the group
	flaps     int  // links in a row that served for a short time only
	permanent bool // the last failure will not mend by itself
}

// note takes down for how long an attempt's link served, and what ended it.
func (p *pace) note(served time.Duration, err error) {
	p.permanent = lossOf(err) == refused
	switch {
	case served == 0:
		p.failures++
		return
	case served < steady:
		p.flaps++
	default:
		p.flaps = 0
	}
	p.failures = 0
}

// pause returns the time until the next attempt: none after a loss, unless the
// member is lost again and again; then 250 ms, doubling up to the interval.
func (p *pace) pause() time.Duration {
	switch {
	case p.permanent:
		return jitter(p.interval)
	case p.failures > 0:
		return jitter(doubled(firstPause, p.failures-1, p.interval))
	case p.flaps > 1:
		return jitter(doubled(firstPause, p.flaps-2, min(flapPause, p.interval)))
	default:
		return 0
	}
}

// doubled is d doubled n times, at most limit.
func doubled(d time.Duration, n int, limit time.Duration) time.Duration {
	for ; n > 0 && d < limit; n-- {
		d *= 2
	}
	return min(d, limit)
}

// jitter varies a pause by a fifth either way, so that members lost together do
// not come back together.
func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}
