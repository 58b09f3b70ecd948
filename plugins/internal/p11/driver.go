package p11

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// Options are what a driver's main gives beside the quirks.
type Options struct {
	// Version is shown in status beside the driver's name.
	Version string
	// Logger takes what an operator should know. Nil means nothing is logged.
	Logger hclog.Logger
}

// Driver is one token behind one PKCS#11 library. It implements
// [pluginproto.Driver].
type Driver struct {
	quirks  Quirks
	version string
	log     hclog.Logger

	fast, slow, probe, rare *lane
	quit                    chan struct{}  // closed by Close
	idle                    time.Duration  // how long a transfer waits for its next step
	wg                      sync.WaitGroup // workers, and Open while it runs

	life           sync.Mutex // guards opened and closed
	opened, closed bool

	// mu guards the fields below. It is held for reading during every call into
	// the library, for writing while the connection changes and while objects on
	// the token do.
	mu       sync.RWMutex
	settings settings
	secrets  secrets
	conn     *conn // nil before Open, after Close and when lost
	lost     error // why conn could not be made anew; final
	serial   string
}

var _ pluginproto.Driver = (*Driver)(nil)

// New returns a driver that has not been opened.
func New(q Quirks, opts Options) *Driver {
	log := opts.Logger
	if log == nil {
		log = hclog.NewNullLogger()
	}
	return &Driver{quirks: q, version: opts.Version, log: log, quit: make(chan struct{}), idle: idleTransfer}
}

// Open implements [pluginproto.Driver]. A PIN is tried once.
func (d *Driver) Open(ctx context.Context, req pluginproto.OpenRequest) (pluginproto.TokenInfo, error) {
	const op = "opening the driver"
	s, err := d.quirks.readSettings(req.Settings)
	if err != nil {
		return pluginproto.TokenInfo{}, err
	}
	if len(req.PIN) == 0 {
		return pluginproto.TokenInfo{}, permanent(op, "no PIN is given")
	}
	dom, err := newDomain(req.Domain)
	if err != nil {
		return pluginproto.TokenInfo{}, err
	}

	d.life.Lock()
	defer d.life.Unlock()
	if d.opened || d.closed {
		dom.wipe()
		return pluginproto.TokenInfo{}, pluginproto.Errorf(pluginproto.ClassMember, op, "a driver is opened once; start a new one")
	}
	d.opened = true
	sec := secrets{pin: append([]byte(nil), req.PIN...), domain: dom}

	type answer struct {
		info pluginproto.TokenInfo
		err  error
	}
	done := make(chan answer, 1)
	d.wg.Go(func() {
		info, err := d.connect(s, sec)
		done <- answer{info, err}
	})
	select {
	case a := <-done:
		if a.err == nil {
			d.startLanes()
		}
		return a.info, a.err
	case <-ctx.Done():
		// The library may be hanging in there. Close waits for it.
		return pluginproto.TokenInfo{}, ctx.Err()
	}
}

// connect makes the first connection.
func (d *Driver) connect(s settings, sec secrets) (pluginproto.TokenInfo, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, err := d.quirks.dial(s, &sec)
	if err != nil {
		sec.wipe()
		d.lost = err
		return pluginproto.TokenInfo{}, err
	}
	d.settings, d.secrets, d.conn, d.serial = s, sec, c, c.place.info.SerialNumber
	info := c.info
	info.DomainCheck = append([]byte(nil), sec.domain.check...)
	info.Driver = d.quirks.Driver
	if d.version != "" {
		info.Driver += " " + d.version
	}
	return info, nil
}

// Facts implements [pluginproto.Driver].
func (d *Driver) Facts(ctx context.Context) ([]pluginproto.Fact, error) {
	if d.quirks.Extend == nil {
		return nil, nil
	}
	return call(ctx, d, d.rare, func(s *session) (facts []pluginproto.Fact, err error) {
		err = s.read(func() error {
			facts, err = s.c.ext.Facts(s.c.at(s.h))
			facts = append(facts, s.c.facts()...)
			return s.fail("asking the token how it is", err)
		})
		return facts, err
	})
}

func (d *Driver) startLanes() {
	next := 0
	lane := func(n int) *lane {
		l := newLane(&d.wg, d.quit, next, n)
		next += n
		return l
	}
	d.fast = lane(d.quirks.fastWorkers())
	d.slow = lane(d.quirks.slowWorkers())
	d.probe = lane(1)
	d.rare = lane(1)
	if d.quirks.Extend != nil {
		d.wg.Go(d.sweepTransfers)
	}
}

// closeGrace is how long Close waits for calls that are inside the library.
const closeGrace = 5 * time.Second

// Close implements [pluginproto.Driver]. It may be called more than once.
func (d *Driver) Close() error {
	d.life.Lock()
	defer d.life.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	close(d.quit)
	done := make(chan struct{})
	go func() { // ends with the last call inside the library
		defer close(done)
		d.wg.Wait()
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.conn != nil {
			d.conn.close()
			d.conn = nil
		}
		d.secrets.wipe()
	}()
	wait := time.NewTimer(closeGrace)
	defer wait.Stop()
	select {
	case <-done:
		return nil
	case <-wait.C:
		return pluginproto.Errorf(pluginproto.ClassMember, "closing the driver",
			"a call into the PKCS#11 library has not come back in %v; end the process", closeGrace)
	}
}

// session is a worker's session for one attempt at a call.
type session struct {
	d   *Driver
	c   *conn
	h   pkcs11.SessionHandle
	job *job // whose steps it takes
}

// read runs f, which calls into the library and writes nothing to the token.
func (s *session) read(f func() error) error {
	s.d.mu.RLock()
	defer s.d.mu.RUnlock()
	if s.d.conn != s.c {
		return errEpoch
	}
	s.job.expect(shortStep)
	return f()
}

// write runs f, which creates, changes or destroys objects on the token, while no
// other call is inside the library. f must be short.
func (s *session) write(f func() error) error {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	if s.d.conn != s.c {
		return errEpoch
	}
	s.job.expect(shortStep)
	return f()
}

// call runs f on a worker of a lane, and again when the connection turns out to be
// lost and can be made anew. T must not share memory with the caller's values.
func call[T any](ctx context.Context, d *Driver, l *lane, f func(*session) (T, error)) (T, error) {
	var out T
	err := l.do(ctx, func(worker int, j *job) (err error) {
		out, err = attempt(d, worker, j, f)
		return err
	})
	if err != nil {
		var zero T
		return zero, err // out may still be written to: leave it alone
	}
	return out, nil
}

// maxTries is how often a call meets the token: once, once more on the connection
// made anew, and a last time for a connection that is lost again just then.
const maxTries = 3

func attempt[T any](d *Driver, worker int, j *job, f func(*session) (T, error)) (T, error) {
	var zero T
	for tries := 0; ; {
		s, err := d.session(worker)
		if err != nil {
			return zero, err
		}
		s.job = j
		out, err := f(s)
		if err == nil {
			return out, nil
		}
		if !d.quirks.Codes.isGone(err) {
			return zero, err
		}
		if !errors.Is(err, errEpoch) { // that one never reached the token
			tries++
		}
		if tries == maxTries {
			return zero, lost(err)
		}
		if err := d.revive(s.c, err); err != nil {
			return zero, err
		}
	}
}

func (d *Driver) session(worker int) (*session, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	switch {
	case d.lost != nil:
		return nil, d.lost
	case d.conn == nil:
		return nil, errClosed()
	}
	return &session{d: d, c: d.conn, h: d.conn.workers[worker]}, nil
}

// revive makes the connection c anew if it is dead or was found unfit. One worker
// does it; the others wait for the lock and find it done.
func (d *Driver) revive(c *conn, found error) error {
	if d.onlyStale(c, found) {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn != c {
		return nil // somebody was here first; session says how it went
	}
	if !isUnfit(found) && c.alive() {
		c.forget() // only a cached handle was stale
		return nil
	}
	d.log.Warn("sessions of the token are lost, connecting again", "serial", d.serial)
	c.close()
	d.conn = nil
	next, err := d.quirks.dial(d.settings, &d.secrets)
	if err == nil {
		if err = sameToken(c.info, next.info); err != nil {
			next.close()
		}
	}
	if err != nil {
		d.lost = lost(err)
		return d.lost
	}
	d.conn = next
	d.log.Info("the token is connected again", "serial", d.serial)
	return nil
}

// sameToken refuses a token that is not what Open told of it. A firmware that was updated, or
// a policy, changes what the group has to know, and only a new driver can tell it.
func sameToken(was, is pluginproto.TokenInfo) error {
	const op = "comparing the token with what it was"
	switch {
	case is.Serial != was.Serial:
		return permanent(op, "it has the serial number "+is.Serial+" where it had "+was.Serial+": the token was replaced")
	case is.Firmware != was.Firmware:
		return pluginproto.Errorf(pluginproto.ClassMember, op, "its firmware is %s where it was %s; a new driver tells what it can do now", is.Firmware, was.Firmware)
	case !slices.Equal(is.Cloning, was.Cloning) || !slices.Equal(is.Mechanisms, was.Mechanisms):
		return pluginproto.Errorf(pluginproto.ClassMember, op, "its cloning protocols or mechanisms are others now; a new driver tells which")
	}
	return nil
}

// onlyStale forgets the handles of a connection that is in order otherwise, where that needs
// no lock for writing: whoever waits for one keeps everybody else waiting too, behind the
// slowest call that is under way, which may make a key for minutes.
func (d *Driver) onlyStale(c *conn, found error) bool {
	if d.quirks.SessionCopies || isUnfit(found) {
		return false
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.conn != c || !c.alive() {
		return false
	}
	c.forget()
	return true
}

// lost makes a member failure of whatever stopped a new connection.
func lost(err error) error {
	e := &pluginproto.Error{Class: pluginproto.ClassMember, Op: "connecting to the token again", CKR: pluginproto.CKRDeviceError}
	if was := (*pluginproto.Error)(nil); errors.As(err, &was) {
		e.CKR, e.Permanent, e.Msg = was.CKR, was.Permanent, was.Msg
		e.Op += ": " + was.Op
		return e
	}
	e.Msg = err.Error()
	return e
}
