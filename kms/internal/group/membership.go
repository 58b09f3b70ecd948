package group

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

var (
	// errDrained is why a member that is drained does not serve.
	errDrained = &pluginproto.Error{
		Class: pluginproto.ClassMember, Op: "being drained", Msg: "kmsd member active, standby or recover ends that",
	}
	// errRemoved ends what a member was at when it left.
	errRemoved = &pluginproto.Error{
		Class: pluginproto.ClassMember, CKR: pluginproto.CKRTokenNotPresent, Op: "serving", Msg: "the member was removed or replaced",
	}
)

// Add takes a member into a running group. It returns when the member's first
// attempt has ended; when that failed, or ctx ended before, the group is as it was. The
// member comes last in the order of the claim to be primary. One that begins drained is
// not connected, and just belongs to the group. ErrMemberExists: there is one of that name.
func (g *Group) Add(ctx context.Context, cfg MemberConfig) error {
	if err := cfg.fault(1); err != nil {
		return fmt.Errorf("adding a member to group %s: %w", g.cfg.Name, err)
	}
	done := make(chan error, 1)
	g.mu.Lock()
	m, err := g.enlistLocked(cfg, done)
	g.mu.Unlock()
	if err != nil || cfg.Drained {
		return err
	}
	err = g.awaitAttempt(ctx, cfg.Name, done)
	if err == nil {
		return nil
	}
	g.mu.Lock()
	if !m.joining { // it was late, but not too late
		g.mu.Unlock()
		return nil
	}
	g.forgetLocked(m, "it could not join: "+err.Error())
	g.mu.Unlock()
	g.seeOff(ctx, m)
	return err
}

// enlistLocked makes a member one of the group's and starts its life.
func (g *Group) enlistLocked(cfg MemberConfig, done chan<- error) (*member, error) {
	switch {
	case g.closed || !g.started:
		return nil, ErrClosed
	case g.byName[cfg.Name] != nil:
		return nil, fmt.Errorf("adding member %s: %w", cfg.Name, ErrMemberExists)
	case len(g.members) >= maxMembers:
		return nil, fmt.Errorf("adding member %s: group %s has %d members, which is the most", cfg.Name, g.cfg.Name, len(g.members))
	}
	var used set
	for _, m := range g.members {
		used.add(m)
	}
	m := newMember(cfg, 0)
	for used.has(m) {
		m.index++
	}
	if m.joining = !cfg.Drained; m.joining {
		m.waiting = append(m.waiting, done)
	}
	g.byName[cfg.Name] = m
	g.members = append(slices.Clone(g.members), m)
	after := g.leaving[cfg.Name] // one driver of a token at a time
	delete(g.leaving, cfg.Name)
	g.liveLocked(m, after, func() {})
	g.regroupLocked(time.Now(), cfg.Name)
	return m, nil
}

// liveLocked starts the life of a member, after the end of another if there is one.
func (g *Group) liveLocked(m *member, after <-chan struct{}, attempted func()) {
	m.ctx, m.leave = context.WithCancelCause(g.ctx)
	g.tasks.Go(func() {
		if after != nil {
			<-after
		}
		g.own(m, attempted)
	})
}

// Remove drains a member, waits for its commands and calls, lets its driver log out
// and forgets the member. ErrLastActive: nobody else serves; force removes it all the
// same, but never the only member. When ctx ends during the drain the member is removed
// with what it still has in flight, which goes elsewhere as at a failure, and the error
// is that of ctx.
func (g *Group) Remove(ctx context.Context, name string, force bool) error {
	g.mu.Lock()
	m, err := g.lookupLocked(name)
	if err == nil && len(g.members) == 1 {
		err = fmt.Errorf("removing member %s: %w, and the only one", name, ErrLastActive)
	}
	if err == nil {
		err = g.drainLocked(m, force)
	}
	g.mu.Unlock()
	if err != nil {
		return err
	}
	rested := g.awaitRest(ctx, m)
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return ErrClosed
	}
	switch {
	case m.left && g.byName[name] != nil:
		err = fmt.Errorf("removing member %s, which was replaced: %w", name, ErrOvertaken)
	case !m.left && !m.drained:
		err = fmt.Errorf("removing member %s, whose drain was ended: %w", name, ErrOvertaken)
	case !m.left && len(g.members) == 1:
		err = fmt.Errorf("removing member %s: %w, and the only one", name, ErrLastActive)
	default:
		g.forgetLocked(m, "removed")
	}
	g.mu.Unlock()
	if err != nil {
		return err
	}
	g.seeOff(ctx, m)
	return rested
}

// forgetLocked takes a member out of the group, unless it has left already, or all have.
func (g *Group) forgetLocked(m *member, why string) {
	if m.left || g.closed {
		return
	}
	g.members = slices.DeleteFunc(slices.Clone(g.members), func(other *member) bool { return other == m })
	delete(g.byName, m.cfg.Name)
	g.leaving[m.cfg.Name] = m.gone
	g.partLocked(m, "removed", why)
	g.regroupLocked(time.Now(), m.cfg.Name)
}

// partLocked tells that a member leaves, and keeps anything more from happening to it.
func (g *Group) partLocked(m *member, to, why string) {
	g.tellLocked(api.Event{
		Time: time.Now(), Type: api.EventMember, Group: g.cfg.Name, Member: m.cfg.Name,
		From: string(m.state), To: to, CKR: pluginproto.CKRName(pluginproto.CKROK), Cause: why,
	})
	m.left = true
	m.answerLocked(errRemoved)
	if l := m.link; l != nil {
		l.dropped = !l.idle() // one that is idle may log out
	}
	m.link = nil
	m.leave(errRemoved)
}

// seeOff waits for the end of a member that has left, but not longer than its caller
// does: its driver has a few seconds, and is then killed.
func (g *Group) seeOff(ctx context.Context, m *member) {
	select {
	case <-m.gone:
	case <-ctx.Done():
	}
}

// Replace gives a member another configuration under its name: what it has in
// flight is finished, its driver ends, and the new one is connected. It returns how
// the first attempt ended. After a failure the member stays, as one that is away. When
// ctx ends while it finishes, what is in flight goes elsewhere.
func (g *Group) Replace(ctx context.Context, cfg MemberConfig) error {
	if err := cfg.fault(1); err != nil {
		return fmt.Errorf("replacing a member of group %s: %w", g.cfg.Name, err)
	}
	g.mu.Lock()
	old, err := g.lookupLocked(cfg.Name)
	if err == nil {
		err = g.drainLocked(old, true)
	}
	g.mu.Unlock()
	if err != nil {
		return err
	}
	rested := g.awaitRest(ctx, old)
	done := make(chan error, 1)
	g.mu.Lock()
	switch {
	case g.closed:
		err = ErrClosed
	case old.left:
		err = fmt.Errorf("replacing member %s, which was removed or replaced: %w", cfg.Name, ErrOvertaken)
	case !old.drained:
		err = fmt.Errorf("replacing member %s, whose drain was ended: %w", cfg.Name, ErrOvertaken)
	default:
		g.succeedLocked(old, cfg, done)
	}
	g.mu.Unlock()
	switch {
	case err != nil:
		return err
	case rested != nil:
		return rested
	case cfg.Drained:
		return nil
	}
	return g.awaitAttempt(ctx, cfg.Name, done)
}

// succeedLocked puts a member in the place of another of its name. It is connected when
// the driver of the other has ended.
func (g *Group) succeedLocked(old *member, cfg MemberConfig, done chan<- error) {
	m := newMember(cfg, old.index)
	m.commands, m.errors, m.answers, m.attemptsTotal = old.commands, old.errors, old.answers, old.attemptsTotal
	if !cfg.Drained {
		m.waiting = append(m.waiting, done)
	}
	g.members = slices.Clone(g.members)
	g.members[slices.Index(g.members, old)] = m
	g.byName[cfg.Name] = m
	g.partLocked(old, string(m.state), "replaced")
	g.liveLocked(m, old.gone, func() {})
	g.regroupLocked(time.Now(), cfg.Name)
}

// Drain takes a member out of choice and returns when nothing is in flight on it any
// more. It stays out until Resume or Recover, also when ctx ends before; when its driver
// ends meanwhile it is not connected anew. ErrLastActive: nobody else serves, and force
// is not set.
func (g *Group) Drain(ctx context.Context, name string, force bool) error {
	g.mu.Lock()
	m, err := g.lookupLocked(name)
	if err == nil {
		err = g.drainLocked(m, force)
	}
	g.mu.Unlock()
	if err != nil {
		return err
	}
	return g.awaitRest(ctx, m)
}

// drainLocked takes a member out of choice.
func (g *Group) drainLocked(m *member, force bool) error {
	if m.drained {
		return nil
	}
	if !force && g.lastActiveLocked(m) {
		return ErrLastActive
	}
	m.drained, m.gaveUp, m.nextTry = true, false, time.Time{}
	l := m.link
	if l != nil && m.state == api.MemberSyncing {
		l.stint.cancel(errDrained)
		l.stint = newStint(l)
		m.trying = false
	}
	what := parked
	if l != nil {
		what = drained
	}
	g.moveLocked(m, what, errDrained)
	m.answerLocked(errDrained)
	return nil
}

// lastActiveLocked reports whether a member serves and nobody else does; nobody of its
// kind, that is, for a standby is no substitute that somebody has agreed to.
func (g *Group) lastActiveLocked(m *member) bool {
	if m.state != api.MemberActive && (m.state != api.MemberStandby || g.state != api.GroupStandbyServing) {
		return false
	}
	for _, other := range g.members {
		if other != m && other.state == m.state {
			return false
		}
	}
	return true
}

// awaitRest waits until a drained member has nothing in flight, and takes part in no
// key operation. ErrOvertaken: its drain was ended.
func (g *Group) awaitRest(ctx context.Context, m *member) error {
	if err := g.awaitIdle(ctx, m); err != nil {
		return err
	}
	release, err := g.Lease(ctx) // a key operation may be between two calls
	if err != nil {
		return err
	}
	release()
	return g.awaitIdle(ctx, m)
}

func (g *Group) awaitIdle(ctx context.Context, m *member) error {
	for {
		g.mu.Lock()
		l := m.link
		if l == nil || l.idle() || !m.drained {
			ended := !m.drained && !m.left
			g.mu.Unlock()
			if ended {
				return fmt.Errorf("draining member %s: %w", m.cfg.Name, ErrOvertaken)
			}
			return nil
		}
		if l.rest == nil {
			l.rest = make(chan struct{})
		}
		rest := l.rest
		g.mu.Unlock()
		select {
		case <-rest:
		case <-l.ctx.Done():
			return nil
		case <-ctx.Done():
			return fmt.Errorf("waiting for what member %s has in flight: %w", m.cfg.Name, ctx.Err())
		}
	}
}

// Resume ends a drain: the member is brought in step and serves. It returns how that
// ended. A member that is not drained needs nothing.
func (g *Group) Resume(ctx context.Context, name string) error {
	return g.bringBack(ctx, name, func(m *member) bool { return m.drained })
}

// SetStandby makes a member a standby or an active one. What it has in flight goes on.
// ErrLastActive: no other active member serves, and force is not set.
func (g *Group) SetStandby(name string, standby, force bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	m, err := g.lookupLocked(name)
	if err != nil || m.standby == standby {
		return err
	}
	if standby && !force && g.lastActiveLocked(m) {
		return ErrLastActive
	}
	m.standby = standby
	if standby {
		g.moveLocked(m, madeStandby, nil)
	} else {
		g.moveLocked(m, madeActive, nil)
	}
	return nil
}

// Reinitialize makes an attempt for every member that is away now, also for those that
// have been given up, but for those that are drained. It returns how each ended, by
// member, when all have.
func (g *Group) Reinitialize(ctx context.Context) map[string]error {
	var away []string
	g.mu.Lock()
	for _, m := range g.members {
		if !m.drained && m.state != api.MemberActive && m.state != api.MemberStandby {
			away = append(away, m.cfg.Name)
		}
	}
	g.mu.Unlock()
	var (
		mu      sync.Mutex // guards results
		results = make(map[string]error, len(away))
		wg      sync.WaitGroup
	)
	for _, name := range away {
		wg.Go(func() {
			err := g.Recover(ctx, name)
			mu.Lock()
			defer mu.Unlock()
			results[name] = err
		})
	}
	wg.Wait()
	return results
}

// Readmit has a member that is in step compared and admitted again on its present
// connection, without taking it out of service first, and returns how that ended. A
// member that is found to be no good for good is taken out. ErrNotInStep: it is not in step.
func (g *Group) Readmit(ctx context.Context, name string) error {
	g.mu.Lock()
	m, err := g.lookupLocked(name)
	if err == nil && m.state != api.MemberActive && m.state != api.MemberStandby {
		err = &MemberError{Member: name, Err: ErrNotInStep}
	}
	if err != nil {
		g.mu.Unlock()
		return err
	}
	l, st := m.link, m.link.stint
	g.mu.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(st.ctx, func() { cancel(context.Cause(st.ctx)) })()
	err = g.inspect(ctx, l, st, func(found Admission) { l.bar(found.Barred) })
	if permanent(err) {
		g.drop(l, err)
	}
	return err
}
