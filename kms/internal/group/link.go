package group

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

const (
	// badProbesAllowed is how many probes in a row may end with an answer that is
	// no success before the member is lost for it.
	badProbesAllowed = 3
	// lastBreath is how long a killed driver may take to be gone before a new one
	// is started beside it.
	lastBreath = time.Second
	// farewell is how long a sound driver may take to log out when its member leaves
	// or the group is closed.
	farewell = 2 * time.Second
)

// errSilent ends the stint of a member that has stopped answering.
var errSilent = &pluginproto.Error{
	Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError,
	Op: "waiting for an answer", Msg: "the member has stopped answering",
}

// member is one member under one configuration. What is named first does not change.
type member struct {
	index int // in a set; that of a member that has left is used again
	cfg   MemberConfig
	kick  chan struct{} // wakes the owner for an attempt
	audit chan struct{} // holds one token while Admit looks at it
	gone  chan struct{} // closed when its owner has ended
	ctx   context.Context
	leave context.CancelCauseFunc // ends ctx; both are made when the owner is started

	// The rest is guarded by Group.mu.
	standby bool // its role
	drained bool // the operator wants it out
	joining bool // it has never been in the group, and leaves if it cannot
	left    bool // it is none of the group's any more

	state  api.MemberState
	since  time.Time
	reason string // why it does not serve; "" when it does
	ckr    uint
	link   *link // nil when no driver runs

	attempts      int            // to bring it back, since it was lost
	attemptsTotal uint64         // since the start
	trying        bool           // an attempt has not been concluded
	reaching      bool           // an attempt has not been connected
	gaveUp        bool           // recovery has used up its attempts
	nextTry       time.Time      // zero: none is planned
	lostAt        time.Time      // when its last link was dropped; zero: never
	waiting       []chan<- error // who wants to know how the next attempt ends
	commands      uint64
	errors        uint64
	times         latency
	answers       api.Histogram // of every command
	token         pluginproto.TokenInfo
}

func newMember(cfg MemberConfig, index int) *member {
	m := &member{
		index: index, cfg: cfg, standby: cfg.Standby, drained: cfg.Drained,
		kick: make(chan struct{}, 1), audit: make(chan struct{}, 1), gone: make(chan struct{}),
		state: api.MemberDown, since: time.Now(), ckr: pluginproto.CKRTokenNotPresent, reason: notYet,
	}
	if m.drained {
		m.state, m.reason = api.MemberDraining, errDrained.Error()
	}
	return m
}

// link is one connection to a member's driver, from Connect to Kill.
type link struct {
	m      *member
	conn   Conn
	token  pluginproto.TokenInfo
	ctx    context.Context // ends when the link is dropped, with the cause
	cancel context.CancelCauseFunc
	again  chan struct{} // tells the owner that the member answers again
	writes chan struct{} // holds one token while a call changes keys on the token

	// The rest is guarded by Group.mu.
	dropped  bool
	entered  bool // it has been in the group
	stale    bool // it has to be admitted, for the first time or again
	barred   map[pluginproto.KeyID]bool
	writer   *turn // who holds the token of writes; nil: nobody
	strikes  int   // see hedger
	stint    stint
	inFlight int           // commands
	load     int           // their cost, and that of rare calls
	owes     time.Time     // since when no answer came though one is due; zero: none is due
	due      int           // calls of any kind that have not returned
	rest     chan struct{} // closed when the link is idle; nil: nobody waits for that
	looked   time.Time     // when its watcher last looked
	resumed  time.Time     // when it last found that this process had been stopped
	heard    time.Time     // last answer of any kind
	good     time.Time     // last success of a command or probe
	silentAt time.Time     // when the last stint ended
	probing  bool          // a probe is under way
	bad      int           // probes in a row that failed
	asking   bool          // the facts of its token are being asked for
	asked    time.Time     // when they were last told, or not
	told     time.Time     // when those were asked for that are on show; zero: with the connection
}

// stint is the time from the moment a link is taken to be sound until it falls
// silent or is dropped. What waits for an answer waits no longer than that.
type stint struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
}

func newStint(l *link) stint {
	ctx, cancel := context.WithCancelCause(l.ctx)
	return stint{ctx, cancel}
}

func (g *Group) newLink(m *member, conn Conn, token pluginproto.TokenInfo) *link {
	now := time.Now()
	l := &link{
		m: m, conn: conn, token: token,
		again:  make(chan struct{}, 1),
		writes: make(chan struct{}, 1),
		stale:  true,
		looked: now, heard: now, good: now, asked: now,
	}
	l.ctx, l.cancel = context.WithCancelCause(m.ctx)
	l.stint = newStint(l)
	return l
}

// bar takes down what the member must not be asked for.
func (l *link) bar(ids []pluginproto.KeyID) {
	l.barred = nil
	for _, id := range ids {
		if l.barred == nil {
			l.barred = make(map[pluginproto.KeyID]bool, len(ids))
		}
		l.barred[id] = true
	}
}

// drop ends a link, once, whoever notices first that it is no good. What waits
// on it is told at once; its watcher kills the driver and its owner starts anew.
func (g *Group) drop(l *link, cause error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.dropLocked(l, cause)
}

func (g *Group) dropLocked(l *link, cause error) {
	if l.dropped {
		return
	}
	l.dropped = true
	l.m.link = nil
	l.m.lostAt = time.Now()
	why := cause
	if l.m.drained {
		why = fmt.Errorf("%w; and its driver has ended: %w", errDrained, cause)
	}
	g.moveLocked(l.m, lossOf(cause, l.entered), why)
	g.settleLocked(l.m, cause)
	l.cancel(cause)
}

// watch looks after a link until it is dropped, then kills the driver.
func (g *Group) watch(l *link) {
	tick := time.NewTicker(min(max(g.cfg.ProbeInterval/16, time.Millisecond), 125*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-l.conn.Done():
			g.drop(l, &pluginproto.Error{
				Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError,
				Op: "watching the driver", Msg: "the driver has ended",
			})
		case <-tick.C:
			g.look(l)
		case <-l.ctx.Done():
			g.end(l)
			return
		}
	}
}

// end is rid of a link's driver. It kills it, but lets a sound one log out first
// when the member leaves or the group is closed.
func (g *Group) end(l *link) {
	g.mu.Lock()
	sound := !l.dropped && context.Cause(l.stint.ctx) != errSilent
	g.mu.Unlock()
	if sound {
		g.bid(l)
	}
	kill(l.conn)
}

// kill ends a driver, and waits until it is gone, or has had its time for that.
func kill(c Conn) {
	c.Kill()
	gone := time.NewTimer(lastBreath)
	defer gone.Stop()
	select {
	case <-c.Done():
	case <-gone.C:
	}
}

// bid gives a driver time to log out.
func (g *Group) bid(l *link) {
	out := make(chan error, 1)
	g.tasks.Go(func() { out <- l.conn.Close() }) // until the driver is killed, at the latest
	late := time.NewTimer(farewell)
	defer late.Stop()
	select {
	case err := <-out:
		if err != nil {
			g.cfg.Logger.Debug("driver did not log out", "group", g.cfg.Name, "member", l.m.cfg.Name, "error", err)
		}
	case <-late.C:
		g.cfg.Logger.Warn("driver is killed, because it does not log out", "group", g.cfg.Name, "member", l.m.cfg.Name, "after", farewell)
	}
}

// look judges by what a member owes whether it is sound, and probes it in time.
func (g *Group) look(l *link) {
	now := time.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stoppedLocked(l, now) {
		l.resumed = now
		if !l.owes.IsZero() {
			l.owes = now // the answer may be waiting to be read
		}
	}
	l.looked = now
	var owed time.Duration
	if !l.owes.IsZero() {
		owed = now.Sub(l.owes)
	}
	trusted := l.stint.ctx.Err() == nil
	switch {
	case l.dropped:
		return
	case owed >= g.cfg.CommandTimeout && now.Sub(lastHeard(l.conn)) >= g.cfg.CommandTimeout:
		g.dropLocked(l, &pluginproto.Error{
			Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "waiting for an answer",
			Msg: fmt.Sprintf("the member has not answered for %v", g.cfg.CommandTimeout),
		})
		return
	case trusted && owed >= g.cfg.ProbeInterval:
		l.silentAt = now
		g.moveLocked(l.m, silent, errSilent)
		g.settleLocked(l.m, errSilent)
		l.stint.cancel(errSilent)
	case l.backLocked():
		wake(l.again)
	}
	if !trusted || now.Sub(l.good) >= g.cfg.ProbeInterval || owed >= g.cfg.ProbeInterval/8 {
		g.probeLocked(l, now)
	}
	if trusted {
		g.askLocked(l, now, owed)
	}
}

// backLocked reports whether a member that had fallen silent answers again, and a call that
// changes keys and was abandoned has ended, so that what it holds stays as it is found.
func (l *link) backLocked() bool {
	return l.stint.ctx.Err() != nil && l.heard.After(l.silentAt) && len(l.writes) == 0
}

// stoppedLocked reports whether this process itself was stopped, or starved of time, since
// the watcher of a link has last looked.
func (g *Group) stoppedLocked(l *link, now time.Time) bool {
	return now.Sub(l.looked) >= g.cfg.ProbeInterval/2
}

// lastHeard is when a heartbeat or an answer came in, as far as the Conn can tell.
func lastHeard(c Conn) time.Time {
	if h, ok := c.(hearer); ok {
		return h.LastHeard()
	}
	return time.Time{}
}

// probeLocked has a member probed, unless a probe is under way.
func (g *Group) probeLocked(l *link, now time.Time) {
	if l.probing || l.dropped || g.closed {
		return
	}
	l.probing = true
	g.oweLocked(l, now)
	g.tasks.Go(func() { g.probe(l) })
}

// probe has the token do a real operation. It has all the time until the link is
// dropped: while it is out, the member owes an answer.
func (g *Group) probe(l *link) {
	_, err := l.conn.Do(l.ctx, pluginproto.Command{Op: pluginproto.OpProbe})
	class := pluginproto.ClassOf(err)
	g.mu.Lock()
	l.probing = false
	g.answerLocked(l, time.Now(), err)
	switch {
	case err == nil:
		l.bad = 0
	case class != pluginproto.ClassBusy:
		l.bad++
	}
	bad := class == pluginproto.ClassMember || l.bad >= badProbesAllowed
	g.mu.Unlock()
	if bad && l.ctx.Err() == nil {
		g.drop(l, fmt.Errorf("probing: %w", err))
	}
}

// oweLocked notes that something was asked of a member that it has to answer.
func (g *Group) oweLocked(l *link, now time.Time) {
	l.due++
	if l.owes.IsZero() {
		l.owes = now
	}
}

// answerLocked notes that a command or probe has returned. Only what the driver
// itself said is an answer: a call given up by its caller leaves the debt, and the
// next probe finds out.
func (g *Group) answerLocked(l *link, now time.Time, err error) {
	l.returnedLocked()
	if !fromDriver(err) {
		return
	}
	if err == nil {
		l.good = now
	}
	l.heardLocked(now)
}

// returnedLocked notes that a call has returned.
func (l *link) returnedLocked() {
	l.due--
	if l.idle() {
		l.restedLocked()
	}
}

// restedLocked wakes those who wait for the link to be idle.
func (l *link) restedLocked() {
	if l.rest != nil {
		close(l.rest)
		l.rest = nil
	}
}

// idle reports whether nothing but a probe is in flight. The caller has Group.mu.
func (l *link) idle() bool {
	if l.probing {
		return l.due == 1
	}
	return l.due == 0
}

// heardLocked notes a sign of life: what is still due is owed from now on.
func (l *link) heardLocked(now time.Time) {
	l.heard = now
	l.strikes = 0
	l.owes = time.Time{}
	if l.due > 0 {
		l.owes = now
	}
}

// fromDriver reports whether a call's outcome came from the other side.
func fromDriver(err error) bool {
	if err == nil {
		return true
	}
	var e *pluginproto.Error
	return errors.As(err, &e) || (!errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded))
}

// wake puts a token into a channel of one, unless there is one already.
func wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
