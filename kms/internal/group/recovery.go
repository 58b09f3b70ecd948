package group

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

const (
	// connectTimeout bounds one Connect: a process start and a login.
	connectTimeout = 30 * time.Second

	// How long to wait when the first probe finds the token busy.
	busyProbePause    = 50 * time.Millisecond // doubles
	busyProbePauseMax = time.Second
)

// Why a member does not serve before its first attempt has come to an end.
const (
	notYet       = "not connected yet"
	beingReached = "not connected yet: its driver starts, or its library waits for the HSM"
)

// errAnew is why a link is dropped that has been silent when its member is to be recovered.
var errAnew = &pluginproto.Error{Class: pluginproto.ClassMember, Op: "recovering", Msg: "given up for a new connection"}

// own is the life of one member, and the only one that brings it back. Its turn
// comes by the clock or by Recover, so that both can never collide. It calls
// attempted after each attempt, and at the end, which may come before the first.
func (g *Group) own(m *member, attempted func()) {
	defer close(m.gone)
	defer attempted()
	p := pace{interval: g.cfg.Recovery.Interval}
	if m.cfg.Drained {
		attempted() // there will be none for now
		if !g.awaitTurn(m, p) {
			return
		}
	}
	for {
		var served time.Duration
		l, err := g.reach(m)
		if err == nil {
			served, err = g.tend(l, attempted)
		}
		attempted()
		if !errors.Is(err, errDrained) {
			p.note(served, err)
		}
		if !g.awaitTurn(m, p) {
			return
		}
	}
}

// awaitTurn waits for the time of the next attempt, and reports false when the
// member leaves or the group is closed.
func (g *Group) awaitTurn(m *member, p pace) bool {
	due := time.Now().Add(p.pause())
	for turn := false; !turn && m.ctx.Err() == nil; {
		g.mu.Lock()
		changed := g.changed
		planned := g.planLocked(m, &p, &due)
		g.mu.Unlock()
		turn = m.awaitDue(planned, due, changed)
	}
	return m.ctx.Err() == nil // which may be over as well as what ended the wait
}

// planLocked reports whether there is to be an attempt when due has come, which may be
// sooner now than it was.
func (g *Group) planLocked(m *member, p *pace, due *time.Time) bool {
	m.nextTry = time.Time{}
	switch r := g.cfg.Recovery; {
	case r.Manual || m.drained:
		return false
	case r.Retries > 0 && p.failures >= r.Retries:
		if !p.toldEnd {
			p.toldEnd = true
			g.giveUpLocked(m)
		}
		return false
	}
	if g.state == api.GroupLost {
		*due = p.hasten(time.Now(), *due)
	}
	m.nextTry = *due
	return true
}

// awaitDue waits until an attempt is due, if one is planned, or is asked for. It reports
// false when something has changed before, which may bear on that.
func (m *member) awaitDue(planned bool, due time.Time, changed <-chan struct{}) bool {
	var turn <-chan time.Time // nil: it has to be asked for
	if planned {
		pause := time.Until(due)
		if pause <= 0 {
			return true
		}
		timer := time.NewTimer(pause)
		defer timer.Stop()
		turn = timer.C
	}
	select {
	case <-turn:
	case <-m.kick:
	case <-m.ctx.Done():
	case <-changed:
		return false
	}
	return true
}

// giveUpLocked tells that recovery has used up its attempts.
func (g *Group) giveUpLocked(m *member) {
	if g.closed || m.left {
		return
	}
	m.gaveUp = true
	m.reason += fmt.Sprintf(" (recovery has given up after %d attempts; mend the cause, then: kmsd member recover %s)", m.attempts, m.cfg.Name)
	g.tellLocked(api.Event{
		Time: time.Now(), Type: api.EventRecovery, Group: g.cfg.Name, Member: m.cfg.Name, To: "given up",
		CKR: pluginproto.CKRName(m.ckr), Cause: m.reason, Alarm: true,
	})
}

// reach connects a member and has its token do one real operation.
func (g *Group) reach(m *member) (*link, error) {
	g.mu.Lock()
	switch {
	case g.closed:
		g.mu.Unlock()
		return nil, ErrClosed
	case m.drained:
		g.mu.Unlock()
		return nil, errDrained
	}
	m.attempts++
	m.attemptsTotal++
	m.trying, m.reaching = true, true
	m.nextTry = time.Time{}
	g.moveLocked(m, reached, nil)
	if m.reason == notYet {
		m.reason = beingReached
	}
	g.mu.Unlock()

	conn, token, err := g.connect(m)
	g.mu.Lock()
	m.reaching = false
	switch {
	case m.ctx.Err() != nil:
		err = context.Cause(m.ctx)
	case g.closed:
		err = ErrClosed
	case m.drained:
		err = errDrained
	case err == nil:
		err = g.kinLocked(m, token)
	}
	if err != nil {
		g.moveLocked(m, lossOf(err, false), err)
		g.settleLocked(m, err)
		g.mu.Unlock()
		if conn != nil {
			kill(conn)
		}
		return nil, err
	}
	defer g.mu.Unlock()
	l := g.newLink(m, conn, token)
	before := m.token.Facts
	m.link, m.token = l, token
	g.moveLocked(m, opened, nil)
	g.tellFactsLocked(m, before)
	return l, nil
}

// connect starts the driver and has its token do one real operation. The Conn may
// be there even when there is an error.
func (g *Group) connect(m *member) (Conn, pluginproto.TokenInfo, error) {
	ctx, cancel := context.WithTimeout(m.ctx, connectTimeout)
	defer cancel()
	conn, token, err := m.cfg.Connect(ctx)
	if err != nil {
		if ctx.Err() != nil && m.ctx.Err() == nil {
			err = fmt.Errorf("%w: it has not come to its token within %v; its library may be waiting for an HSM that cannot be reached from here", err, connectTimeout)
		}
		return nil, pluginproto.TokenInfo{}, err
	}
	for tries := 0; ; tries++ {
		_, err := conn.Do(ctx, pluginproto.Command{Op: pluginproto.OpProbe})
		if err == nil {
			return conn, token, nil
		}
		err = fmt.Errorf("probing for the first time: %w", err)
		if pluginproto.ClassOf(err) != pluginproto.ClassBusy {
			return conn, token, err
		}
		select { // a token that is busy works
		case <-time.After(doubled(busyProbePause, tries, busyProbePauseMax)):
		case <-conn.Done():
			return conn, token, err
		case <-ctx.Done():
			return conn, token, err
		}
	}
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
			return refuse("its domain secret is not that of member %s: both need the same one", other.cfg.Name)
		}
	}
	return nil
}

// tend watches a link and has its member admitted, again each time it answers
// after a silence or its drain ends, until the link is dropped. It calls attempted after
// each admission. It returns for how long the member was in the group, 0 for never, and
// what ended the link.
func (g *Group) tend(l *link, attempted func()) (served time.Duration, err error) {
	watched := make(chan struct{})
	g.tasks.Go(func() {
		defer close(watched)
		g.watch(l)
	})
	var entered time.Time
	for l.ctx.Err() == nil {
		if st, due := g.renew(l); due {
			err = g.admit(l, st)
			switch {
			case err == nil && entered.IsZero():
				entered = time.Now()
			case err != nil && st.ctx.Err() == nil:
				g.drop(l, err)
			}
			attempted()
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

// renew returns the stint for the next admission, a new one on a link that answers
// again. It reports false when there is none to make.
func (g *Group) renew(l *link) (stint, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	silenced := l.stint.ctx.Err() != nil
	switch {
	case l.dropped || l.ctx.Err() != nil || l.m.drained:
		return stint{}, false
	case silenced && !l.backLocked(): // who was woken for it may have been told twice
		return stint{}, false
	case !silenced && !l.stale:
		return stint{}, false
	}
	l.stale = false
	if silenced {
		l.stint = newStint(l)
		g.moveLocked(l.m, answered, nil)
	}
	return l.stint, true
}

// admit brings a member in step and lets it into the group. The lease is held
// from the last look until the member is in, so that whoever makes a key either
// is seen by that look or finds the member in step.
func (g *Group) admit(l *link, st stint) error {
	return g.inspect(st.ctx, l, st, func(found Admission) {
		what := admitted
		if l.m.standby {
			what = onStand
		}
		l.entered = true
		l.bar(found.Barred)
		if l.m.joining {
			l.m.joining = false
			g.tellLocked(api.Event{
				Time: time.Now(), Type: api.EventMember, Group: g.cfg.Name, Member: l.m.cfg.Name,
				To: "joined", CKR: pluginproto.CKRName(pluginproto.CKROK), Cause: "a new member is in step",
			})
		}
		g.moveLocked(l.m, what, nil)
		g.concludeLocked(l.m, nil)
		l.m.answerLocked(nil) // before it can be lost again
	})
}

// inspect has a member looked at twice, one at a time, and calls enter under the lock
// and the lease when all is well. ctx ends with the stint, or earlier.
func (g *Group) inspect(ctx context.Context, l *link, st stint, enter func(Admission)) error {
	select {
	case l.m.audit <- struct{}{}:
		defer func() { <-l.m.audit }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	h := &handle{g: g, l: l, st: st}
	if _, err := g.cfg.Admit(ctx, h, false); err != nil {
		return endOf(ctx, err)
	}
	release, err := g.Lease(ctx)
	if err != nil {
		return endOf(ctx, err)
	}
	defer release()
	found, err := g.cfg.Admit(ctx, h, true)
	if err != nil {
		return endOf(ctx, err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case st.ctx.Err() != nil: // ctx ends with it, but not in the same moment
		return context.Cause(st.ctx)
	}
	enter(found)
	return nil
}

// endOf prefers the reason why a context ended to the error that this led to.
func endOf(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// settleLocked tells those who asked for a recovery that the attempt has failed, in the same
// moment as it is seen: who asks later wants another one. Those who were overtaken by a drain
// have been told of it already, and for whose sake an admission was broken off, they wait
// for the attempt.
func (g *Group) settleLocked(m *member, err error) {
	if errors.Is(err, errDrained) || errors.Is(err, errAnew) {
		m.trying = false
		return
	}
	g.concludeLocked(m, err)
	m.answerLocked(err)
}

// answerLocked answers all who wait for an attempt.
func (m *member) answerLocked(err error) {
	for _, w := range m.waiting {
		w <- err
	}
	m.waiting = nil
	select { // they asked for this attempt
	case <-m.kick:
	default:
	}
}

// concludeLocked tells how an attempt ended, once. The first success of a member that
// was never lost is no recovery.
func (g *Group) concludeLocked(m *member, err error) {
	n, trying := m.attempts, m.trying
	m.trying = false
	if err == nil {
		m.attempts, m.gaveUp = 0, false
	}
	if !trying || g.closed || m.left || (err == nil && n == 1 && m.lostAt.IsZero()) {
		return
	}
	e := api.Event{
		Time: time.Now(), Type: api.EventRecovery, Group: g.cfg.Name, Member: m.cfg.Name, To: "succeeded",
		CKR: pluginproto.CKRName(pluginproto.CKROK), Cause: fmt.Sprintf("attempt %d succeeded", n),
	}
	if err != nil {
		ckr := pluginproto.CKROf(err)
		if ckr == pluginproto.CKROK {
			ckr = pluginproto.CKRTokenNotPresent
		}
		e.To, e.CKR, e.Cause = "failed", pluginproto.CKRName(ckr), fmt.Sprintf("attempt %d failed: %v", n, err)
	}
	g.tellLocked(e)
}

// Recover makes an attempt to bring a member back now and returns how it ended.
// When an attempt is under way it joins that one. A member that is in step needs
// none; one that has stopped answering is given up and connected anew; the drain of
// one that is drained is ended.
func (g *Group) Recover(ctx context.Context, name string) error {
	return g.bringBack(ctx, name, func(m *member) bool {
		return m.state != api.MemberActive && m.state != api.MemberStandby
	})
}

// bringBack has a member brought into the group, if it needs that, and returns how the
// next attempt or admission ended.
func (g *Group) bringBack(ctx context.Context, name string, needs func(*member) bool) error {
	done := make(chan error, 1)
	g.mu.Lock()
	m, err := g.lookupLocked(name)
	if err != nil || !needs(m) {
		g.mu.Unlock()
		return err
	}
	ended := m.drained
	m.drained = false
	m.waiting = append(m.waiting, done)
	l := m.link
	if l != nil {
		l.restedLocked() // whoever waits for the drain has to look again
	}
	switch {
	case l != nil && l.stint.ctx.Err() != nil: // before its owner finds that it answers again
		g.dropLocked(l, errAnew)
	case ended && l != nil:
		l.stale = true
		g.moveLocked(m, resumed, nil)
		wake(l.again)
	case ended && m.reaching: // the attempt that was under way when it was drained
		g.moveLocked(m, reached, nil)
	}
	wake(m.kick) // for when what is under way ends before it is an attempt
	g.mu.Unlock()
	return g.awaitAttempt(ctx, name, done)
}

func (g *Group) awaitAttempt(ctx context.Context, name string, done <-chan error) error {
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("waiting for an attempt with member %s: %w", name, ctx.Err())
	}
}
