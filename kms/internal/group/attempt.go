package group

import (
	"context"
	"time"

	"kmsd/pluginproto"
)

// How an attempt begins.
type beginning uint8

const (
	startOnly  beginning = iota // nobody has the command; a last resort is better than none
	startMoved                  // beside one that has stopped answering
	startHedge                  // beside one that is slow, if the budget allows
)

// start puts the command on the best member that has not had it, and reports
// whether there was one.
func (d *dispatch) start(how beginning) bool {
	slot := d.freeSlot(how)
	if slot < 0 {
		return false
	}
	g := d.g
	skip := d.busy
	for _, a := range d.live {
		if a != nil {
			skip.add(a.l.m)
		}
	}
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return false
	}
	l := g.chooseLocked(d.failed, skip, how == startOnly)
	if l == nil || (how == startHedge && !g.hedge.afford()) {
		g.mu.Unlock()
		return false
	}
	a := &attempt{l: l, began: time.Now()}
	if l.stint.ctx.Err() == nil {
		a.gone = l.stint.ctx.Done()
	}
	l.inFlight++
	l.load += d.cost
	g.oweLocked(l, a.began)
	if how != startHedge {
		g.hedge.sent()
	}
	slow := g.hedge.after
	g.tasks.Add(1)
	g.mu.Unlock()

	d.live[slot] = a
	d.patience, d.changed, d.room = nil, nil, nil
	if g.cfg.Hedge && how != startHedge && len(g.members) > 1 {
		d.slow = time.After(slow)
	}
	if a.gone == nil {
		d.wait()
	}
	d.cmd.users.Add(1)
	g.give(job{d, a})
	return true
}

// freeSlot returns where to note another attempt, -1 when there is no room. A
// silent member gives up its place to one that may answer.
func (d *dispatch) freeSlot(how beginning) int {
	silent := -1
	for i, a := range d.live {
		if a == nil {
			return i
		}
		if a.gone == nil && how == startMoved {
			silent = i
		}
	}
	return silent
}

// carry runs an attempt and brings its answer to whoever still wants it. It is
// not cut short when the caller leaves: until the member answers or is dropped
// the command counts as the member's load, so that a silent member looks busy.
// Only a deadline goes with it, for the driver to skip what nobody waits for; one
// that is further away than the command timeout would never matter.
func (d *dispatch) carry(a *attempt) {
	defer d.g.tasks.Done()
	ctx, cancel := a.l.ctx, context.CancelFunc(func() {})
	if t, ok := d.ctx.Deadline(); ok && t.Sub(a.began) < d.g.cfg.CommandTimeout {
		ctx, cancel = context.WithDeadline(ctx, t)
	}
	a.res, a.err = a.l.conn.Do(ctx, d.cmd.Command)
	cancel()
	d.g.countOut(a, d.cost)
	d.cmd.release()
	select {
	case d.answers <- a:
	case <-d.left:
		a.discard()
	}
}

// discard wipes an answer that nobody wants; it may be a plaintext.
func (a *attempt) discard() { clear(a.res.Output) }

// countOut takes down how an attempt ended and drops its member when it failed.
func (g *Group) countOut(a *attempt, cost int) {
	now := time.Now()
	took := now.Sub(a.began)
	g.mu.Lock()
	l, m := a.l, a.l.m
	l.inFlight--
	l.load -= cost
	g.answerLocked(l, now, a.err)
	if fromDriver(a.err) {
		m.commands++
		m.times.add(took)
		if l.stint.ctx.Err() == nil {
			g.hedge.took(took)
		}
	}
	fault := a.err != nil && pluginproto.ClassOf(a.err) == pluginproto.ClassMember
	if a.err != nil && pluginproto.ClassOf(a.err) != pluginproto.ClassCaller {
		m.errors++
	}
	dropped := l.dropped
	g.mu.Unlock()
	if fault && !dropped {
		g.drop(l, a.err)
	}
}
