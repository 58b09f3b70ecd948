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
	startAway                   // beside one that seems to hang
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
	want := wanted{
		key: d.cmd.Key, failed: d.failed, skip: d.busy,
		sound: how == startAway || how == startHedge, lastResort: how == startOnly,
	}
	for _, a := range d.live {
		if a != nil {
			want.skip.add(a.l.m)
		}
	}
	g.mu.Lock()
	d.seen = g.changed
	if g.closed {
		g.mu.Unlock()
		return false
	}
	l := g.chooseLocked(want)
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
	switch how {
	case startOnly, startMoved:
		g.hedge.sent()
	case startAway:
		g.hedge.moved()
	}
	var look time.Duration // when to ask what the command needs; 0: never
	if g.cfg.Hedge && len(g.members) > 1 {
		look = min(g.hedge.quiet.after, g.hedge.slow[d.effort].after*time.Duration(d.items))
	}
	g.tasks.Add(1)
	g.mu.Unlock()

	d.live[slot] = a
	d.patience, d.changed, d.room = nil, nil, nil
	if look > 0 {
		d.slow = time.After(look)
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
		if a.gone == nil && (how == startMoved || how == startAway) {
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
	d.countOut(a)
	d.cmd.release()
	select {
	case d.answers <- a:
	case <-d.left:
		a.discard()
	}
}

// discard wipes an answer that nobody wants; it may be a plaintext.
func (a *attempt) discard() { a.res.Wipe() }

// countOut takes down how an attempt ended and drops its member when it failed.
func (d *dispatch) countOut(a *attempt) {
	g, l, m := d.g, a.l, a.l.m
	now := time.Now()
	took := now.Sub(a.began)
	g.mu.Lock()
	l.inFlight--
	l.load -= d.cost
	a.over = true
	owes := l.owes
	g.answerLocked(l, now, a.err)
	if fromDriver(a.err) {
		m.commands++
		each := took / time.Duration(d.items)
		m.times.add(each)
		observe(&m.answers, each)
		if g.cfg.Hedge && l.stint.ctx.Err() == nil {
			g.hedge.slow[d.effort].took(each)
			g.hedge.quiet.took(now.Sub(owes))
		}
	}
	fault := a.err != nil && pluginproto.ClassOf(a.err) == pluginproto.ClassMember
	if a.err != nil && pluginproto.ClassOf(a.err) != pluginproto.ClassCaller {
		m.errors++
	}
	a.barred = l.bars(d.cmd.Key)
	dropped := l.dropped
	g.mu.Unlock()
	if fault && !dropped {
		g.drop(l, a.err)
	}
}
