package group

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"kmsd/pluginproto"
)

const (
	// maxLive is on how many members one command may be at the same time: the one
	// that fell silent, the next, and a hedge.
	maxLive = 3

	busyPause    = 5 * time.Millisecond // first pause when all members are busy; doubles
	busyPauseMax = 250 * time.Millisecond
)

// Do runs a command on the least busy member. It goes to another member when that
// one fails, is busy or stops answering, and to a second one at the same time when
// hedging finds it slow; the first success is the answer. A command is tried once
// on each member, and once more on one that has come back meanwhile.
func (g *Group) Do(ctx context.Context, cmd pluginproto.Command) (pluginproto.Result, error) {
	if err := ctx.Err(); err != nil {
		return pluginproto.Result{}, err
	}
	d := &dispatch{
		g: g, ctx: ctx, cmd: copyCommand(cmd), effort: effortOf(cmd), items: max(1, len(cmd.Items)),
		answers: make(chan *attempt), left: make(chan struct{}),
	}
	d.cost = g.weigh(commandCosts[d.effort] * d.items)
	defer d.cmd.release()
	defer close(d.left)
	return d.run()
}

// dispatch is one command on its way to an answer. It belongs to the goroutine
// that called Do.
type dispatch struct {
	g       *Group
	ctx     context.Context
	cmd     *sharedCommand
	effort  effort
	items   int           // how many of that effort it is
	cost    int           // what it counts for when a member is chosen
	answers chan *attempt // from the attempts
	left    chan struct{} // closed when nobody waits for answers any more

	live     [maxLive]*attempt
	failed   set   // members that were lost, or whose answer nobody understands
	busy     set   // members that were short of something
	busyRuns int   // how often all of them were
	unknowns int   // answers of ClassUnknown
	second   bool  // on the second round, with members that have come back
	lastErr  error // of the last attempt that failed

	seen   <-chan struct{}  // closed when a member's state has changed since one was last looked for
	slow   <-chan time.Time // fires when it is time to ask what the command needs; nil: no hedging
	asked  int              // how often that was asked in vain
	hedged bool             // it was, within the budget

	// While only members that have stopped answering have the command:
	patience <-chan time.Time // fires when they have had their time
	changed  <-chan struct{}  // closed when some member's state changes
	room     <-chan time.Time // fires when a busy member is worth another try; nil: none is busy
}

// attempt is a command on one member.
type attempt struct {
	l     *link
	gone  <-chan struct{} // closed when the member stops answering; nil when that is known
	began time.Time
	res   pluginproto.Result
	err   error

	barred bool // its member turned out to have a wrong copy of the key
	over   bool // its answer is on its way; guarded by Group.mu
}

func (d *dispatch) run() (pluginproto.Result, error) {
	err := d.launch()
	for err == nil {
		select {
		case a := <-d.answers:
			var res pluginproto.Result
			var final bool
			if res, final, err = d.take(a); final {
				return res, err
			}
		case <-d.gone(0):
			err = d.move(0)
		case <-d.gone(1):
			err = d.move(1)
		case <-d.gone(2):
			err = d.move(2)
		case <-d.slow:
			d.beside()
		case <-d.changed:
			err = d.goOn()
		case <-d.room:
			d.room, d.busy = nil, 0
			err = d.goOn()
		case <-d.patience:
			err = d.lost()
		case <-d.ctx.Done():
			err = d.expired()
		}
	}
	return pluginproto.Result{}, err
}

// take takes an answer. When it does not end the command, some member has it.
func (d *dispatch) take(a *attempt) (res pluginproto.Result, final bool, err error) {
	if !d.forget(a) {
		a.discard() // its member was dropped, and somebody else has the command
		return res, false, nil
	}
	if !fromDriver(a.err) && d.overdue() {
		<-d.ctx.Done()
		return res, true, d.expired()
	}
	if d.judge(a) {
		return a.res, true, d.named(a)
	}
	if err := d.goOn(); err != nil {
		return res, true, err
	}
	return res, false, nil
}

// goOn sees to it that a member that is not known to be silent has the command, or
// else that the wait for one has an end.
func (d *dispatch) goOn() error {
	if d.idle() {
		return d.launch()
	}
	for _, a := range d.live {
		if a != nil && a.gone != nil {
			return nil
		}
	}
	if !d.start(startMoved) {
		d.wait()
	}
	return nil
}

// overdue reports whether the caller's deadline has passed.
func (d *dispatch) overdue() bool {
	t, ok := d.ctx.Deadline()
	return ok && !time.Now().Before(t)
}

// judge reports whether an answer ends the command, and notes it if not.
func (d *dispatch) judge(a *attempt) (final bool) {
	if a.barred {
		a.discard()
		d.failed.add(a.l.m)
		d.lastErr = quarantined(a.l.m, d.cmd.Key)
		return false
	}
	if a.err == nil {
		return true
	}
	class := pluginproto.ClassOf(a.err)
	switch {
	case a.l.ctx.Err() != nil:
		class = pluginproto.ClassMember // cut off by the loss of the member
	case !fromDriver(a.err):
		class = pluginproto.ClassUnknown
	}
	switch class {
	case pluginproto.ClassMember:
		d.failed.add(a.l.m)
	case pluginproto.ClassBusy:
		d.busy.add(a.l.m)
	case pluginproto.ClassUnknown:
		d.failed.add(a.l.m)
		if d.unknowns++; d.unknowns > 1 {
			return d.idle()
		}
	default:
		return true
	}
	d.lastErr = d.named(a)
	return false
}

func (d *dispatch) named(a *attempt) error {
	if a.err == nil {
		return nil
	}
	return &MemberError{Member: a.l.m.cfg.Name, Err: a.err}
}

// move finds another member for a command whose member has stopped answering or
// is lost. While it is only silent its answer is still welcome, and when it has given one
// just before, that is on its way.
func (d *dispatch) move(i int) error {
	a := d.live[i]
	a.gone = nil
	if d.answered(a) {
		return nil
	}
	if a.l.ctx.Err() != nil {
		d.live[i] = nil
		d.failed.add(a.l.m)
		d.lastErr = &MemberError{Member: a.l.m.cfg.Name, Err: context.Cause(a.l.ctx)}
	}
	return d.goOn()
}

// answered reports whether an attempt has come to its end.
func (d *dispatch) answered(a *attempt) bool {
	d.g.mu.Lock()
	defer d.g.mu.Unlock()
	return a.over
}

// wait limits the time for an answer when all that is left are members that have
// stopped answering.
func (d *dispatch) wait() {
	if d.patience == nil {
		d.patience = time.After(grace)
	}
	if d.busy != 0 && d.room == nil {
		d.room = time.After(d.nextPause())
	}
	d.changed = d.seen
}

// launch starts an attempt when none is live, if need be after waiting for a
// member that has room again or is coming back.
func (d *dispatch) launch() error {
	var patience <-chan time.Time
	for !d.start(startOnly) {
		if d.busy == 0 && d.readmit() {
			continue
		}
		d.g.mu.Lock()
		closed, returning := d.g.closed, d.g.returningLocked(time.Now())
		d.g.mu.Unlock()
		changed := d.seen
		var room <-chan time.Time
		switch {
		case closed:
			return ErrClosed
		case d.unknowns > 0 && d.lastErr != nil && d.busy == 0:
			return d.lastErr
		case d.busy != 0:
			room = time.After(d.nextPause())
			changed = nil
		case d.outdated():
			continue // one that was not back yet may be back now, and not be returning any more
		case d.second && d.failed != 0, !returning:
			return d.lost()
		case patience == nil:
			patience = time.After(grace)
		}
		select {
		case <-room:
			d.busy = 0
		case <-changed:
		case <-patience:
			return d.lost()
		case <-d.ctx.Done():
			return d.expired()
		}
	}
	return nil
}

// outdated reports whether a member's state has changed since one was last looked for.
func (d *dispatch) outdated() bool {
	select {
	case <-d.seen:
		return true
	default:
		return false
	}
}

// beside sends the command to one more member when it needs that, and sees to it
// that it is asked again. Each answer in vain makes that a little later, so that
// a thousand commands on members that all hang do not keep this process busy.
func (d *dispatch) beside() {
	d.slow = nil
	need, again := d.waits(time.Now())
	switch {
	case need == needAway && d.start(startAway):
	case need == needHedge && d.start(startHedge):
		d.hedged = true
	default:
		d.asked++
		d.slow = time.After(again * time.Duration(1+d.asked/16))
	}
}

// readmit gives members that were lost and have come back a second chance, once.
func (d *dispatch) readmit() bool {
	d.g.mu.Lock()
	defer d.g.mu.Unlock()
	if d.second || d.failed == 0 || d.unknowns > 0 || d.g.chooseLocked(wanted{key: d.cmd.Key}) == nil {
		return false
	}
	d.second, d.failed = true, 0
	return true
}

func (d *dispatch) nextPause() time.Duration {
	p := doubled(busyPause, d.busyRuns, busyPauseMax)
	d.busyRuns++
	return p/2 + rand.N(p)
}

func (d *dispatch) lost() error {
	d.g.mu.Lock()
	defer d.g.mu.Unlock()
	if err := d.g.barredLocked(d.cmd.Key, d.lastErr); err != nil {
		return err
	}
	return d.g.lossLocked(d.lastErr)
}

func (d *dispatch) expired() error {
	if d.lastErr != nil {
		return fmt.Errorf("group %s: %w (last: %w)", d.g.cfg.Name, d.ctx.Err(), d.lastErr)
	}
	return fmt.Errorf("group %s: waiting for an answer: %w", d.g.cfg.Name, d.ctx.Err())
}

func (d *dispatch) idle() bool { return d.live == [maxLive]*attempt{} }

func (d *dispatch) gone(i int) <-chan struct{} {
	if a := d.live[i]; a != nil {
		return a.gone
	}
	return nil
}

// forget takes an attempt off the list and reports whether it was on it.
func (d *dispatch) forget(a *attempt) bool {
	for i, b := range d.live {
		if a == b {
			d.live[i] = nil
			return true
		}
	}
	return false
}

// sharedCommand is a command that may be on several members, and on a silent one
// long after its caller has left. It owns its bytes.
type sharedCommand struct {
	pluginproto.Command
	bytes []byte       // all of the command's, in one piece
	users atomic.Int32 // who may still read them
}

func copyCommand(cmd pluginproto.Command) *sharedCommand {
	c := &sharedCommand{Command: cmd}
	c.users.Store(1)
	size := len(cmd.Input) + len(cmd.IV) + len(cmd.AAD) + len(cmd.Signature)
	for _, it := range cmd.Items {
		size += len(it.Input) + len(it.IV) + len(it.AAD)
	}
	c.bytes = make([]byte, 0, size)
	own := func(b []byte) []byte {
		if b == nil {
			return nil
		}
		from := len(c.bytes)
		c.bytes = append(c.bytes, b...)
		return c.bytes[from:len(c.bytes):len(c.bytes)]
	}
	c.Input, c.IV, c.AAD, c.Signature = own(cmd.Input), own(cmd.IV), own(cmd.AAD), own(cmd.Signature)
	if cmd.Items != nil {
		c.Items = make([]pluginproto.Item, len(cmd.Items))
		for i, it := range cmd.Items {
			c.Items[i] = pluginproto.Item{Input: own(it.Input), IV: own(it.IV), AAD: own(it.AAD)}
		}
	}
	return c
}

// release wipes the bytes when nobody reads them any more.
func (c *sharedCommand) release() {
	if c.users.Add(-1) == 0 {
		clear(c.bytes)
	}
}
