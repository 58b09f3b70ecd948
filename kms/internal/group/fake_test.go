package group_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// hsm is an HSM with scripted faults, on the far side of as many connections as
// the group makes to it.
type hsm struct {
	name string

	mu       sync.Mutex // guards what follows
	frozen   chan struct{}
	delay    time.Duration                   // of each call
	turn     chan struct{}                   // makes calls wait for each other, in order; nil: they do not
	work     func() time.Duration            // of each command, besides; nil: none
	probed   func() time.Duration            // of each probe, instead of work; nil: as of a command
	keyDelay time.Duration                   // of each change of keys, besides
	fault    func(pluginproto.Command) error // asked before each command
	refusal  error                           // of Connect
	conns    []*conn
	attempts []time.Time // of Connect
	served   int         // commands that were no probes
	logouts  int
	keys     map[pluginproto.KeyID]bool
	serial   string
	domain   string
	facts    []pluginproto.Fact
	noFacts  error         // why it has none to tell; nil: it has
	asked    int           // for its facts
	beats    bool          // sends heartbeats even when frozen
	alone    func()        // called when it is connected while a driver of it still runs; nil: it may be
	dying    time.Duration // that a killed driver takes to be gone
}

func newHSM(name string) *hsm {
	return &hsm{name: name, keys: map[pluginproto.KeyID]bool{}, serial: "serial of " + name, domain: "domain"}
}

func (h *hsm) connect(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.attempts = append(h.attempts, time.Now())
	if h.refusal != nil {
		return nil, pluginproto.TokenInfo{}, h.refusal
	}
	if n := len(h.conns); n > 0 && h.alone != nil && !closed(h.conns[n-1].done) {
		h.alone()
	}
	c := &conn{hsm: h, done: make(chan struct{}), pid: 100 + len(h.conns)}
	h.conns = append(h.conns, c)
	return c, pluginproto.TokenInfo{Label: h.name, Serial: h.serial, DomainCheck: []byte(h.domain), Facts: slices.Clone(h.facts)}, nil
}

func (h *hsm) set(change func(*hsm)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change(h)
}

func (h *hsm) freeze() { h.set(func(h *hsm) { h.frozen = make(chan struct{}) }) }

func (h *hsm) thaw() {
	h.set(func(h *hsm) {
		close(h.frozen)
		h.frozen = nil
	})
}

// crash ends the driver process.
func (h *hsm) crash() {
	h.mu.Lock()
	c := h.conns[len(h.conns)-1]
	h.mu.Unlock()
	c.Kill()
}

func (h *hsm) count() (served, connections, attempts int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.served, len(h.conns), len(h.attempts)
}

// conn is one driver process.
type conn struct {
	hsm  *hsm
	pid  int
	once sync.Once
	done chan struct{}
}

func (c *conn) Done() <-chan struct{} { return c.done }
func (c *conn) PID() int              { return c.pid }

func (c *conn) Kill() {
	c.once.Do(func() {
		if c.hsm.dying > 0 {
			time.AfterFunc(c.hsm.dying, func() { close(c.done) })
			return
		}
		close(c.done)
	})
}

// Close logs out, which a frozen HSM does not.
func (c *conn) Close() error {
	if err := c.pass(context.Background(), pluginproto.Command{}); err != nil {
		return err
	}
	c.hsm.set(func(h *hsm) { h.logouts++ })
	return nil
}

func (c *conn) LastHeard() time.Time {
	c.hsm.mu.Lock()
	defer c.hsm.mu.Unlock()
	if c.hsm.beats {
		return time.Now()
	}
	return time.Time{}
}

func errDevice() error {
	return &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "encrypting"}
}

// pass waits as the HSM has been told to.
func (c *conn) pass(ctx context.Context, cmd pluginproto.Command) error {
	c.hsm.mu.Lock()
	frozen, delay, fault, turn := c.hsm.frozen, c.hsm.delay, c.hsm.fault, c.hsm.turn
	switch {
	case cmd.Op == pluginproto.OpProbe && c.hsm.probed != nil:
		delay += c.hsm.probed()
	case cmd.Op != 0 && c.hsm.work != nil:
		delay += c.hsm.work()
	}
	c.hsm.mu.Unlock()
	select {
	case <-c.done:
		return errDevice()
	default:
	}
	if turn != nil {
		turn <- struct{}{}
		defer func() { <-turn }()
	}
	if frozen != nil {
		select {
		case <-frozen:
		case <-c.done:
			return errDevice()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-c.done:
			return errDevice()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if fault != nil {
		return fault(cmd)
	}
	return nil
}

func (c *conn) Do(ctx context.Context, cmd pluginproto.Command) (pluginproto.Result, error) {
	if err := c.pass(ctx, cmd); err != nil {
		return pluginproto.Result{}, err
	}
	if cmd.Op != pluginproto.OpProbe {
		c.hsm.mu.Lock()
		c.hsm.served++
		c.hsm.mu.Unlock()
	}
	return pluginproto.Result{Output: []byte(c.hsm.name), IV: slices.Clone(cmd.IV)}, nil
}

func (c *conn) Open(context.Context, pluginproto.OpenRequest) (pluginproto.TokenInfo, error) {
	return pluginproto.TokenInfo{}, errors.New("opened twice")
}

func (c *conn) List(ctx context.Context) ([]pluginproto.Object, error) {
	if err := c.pass(ctx, pluginproto.Command{}); err != nil {
		return nil, err
	}
	c.hsm.mu.Lock()
	defer c.hsm.mu.Unlock()
	var all []pluginproto.Object
	for id := range c.hsm.keys {
		all = append(all, pluginproto.Object{ID: id})
	}
	return all, nil
}

func (c *conn) Inspect(ctx context.Context, id pluginproto.KeyID) (pluginproto.Object, error) {
	return pluginproto.Object{ID: id}, c.pass(ctx, pluginproto.Command{})
}

func (c *conn) Generate(ctx context.Context, spec pluginproto.KeySpec) (pluginproto.Object, error) {
	return pluginproto.Object{ID: spec.ID}, c.change(ctx, spec.ID, true)
}

func (c *conn) SetAttributes(ctx context.Context, _ pluginproto.KeyID, _ pluginproto.Attributes) error {
	return c.pass(ctx, pluginproto.Command{})
}

func (c *conn) Destroy(ctx context.Context, id pluginproto.KeyID) error {
	return c.change(ctx, id, false)
}

func (c *conn) Facts(ctx context.Context) ([]pluginproto.Fact, error) {
	c.hsm.set(func(h *hsm) { h.asked++ })
	if err := c.pass(ctx, pluginproto.Command{}); err != nil {
		return nil, err
	}
	c.hsm.mu.Lock()
	defer c.hsm.mu.Unlock()
	return slices.Clone(c.hsm.facts), c.hsm.noFacts
}

func (c *conn) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	return pluginproto.CloneReply{Done: true}, c.change(ctx, req.Keys[0], true)
}

func (c *conn) change(ctx context.Context, id pluginproto.KeyID, there bool) error {
	c.hsm.mu.Lock()
	delay, turn := c.hsm.keyDelay, c.hsm.turn
	c.hsm.mu.Unlock()
	if delay > 0 && turn != nil {
		turn <- struct{}{}
		elapse(delay)
		<-turn
		delay = 0
	}
	if delay > 0 { // a timer of no time at all breaks the race detector in a bubble (golang/go#78156)
		select {
		case <-time.After(delay):
		case <-c.done:
			return errDevice()
		}
	}
	if err := c.pass(ctx, pluginproto.Command{}); err != nil {
		return err
	}
	c.hsm.mu.Lock()
	defer c.hsm.mu.Unlock()
	if there {
		c.hsm.keys[id] = true
	} else {
		delete(c.hsm.keys, id)
	}
	return nil
}

// rig is a group of fake HSMs.
type rig struct {
	*group.Group
	t    testing.TB
	hsms map[string]*hsm

	mu     sync.Mutex // guards events
	events []api.Event
}

// newRig starts a group of the named members; a name that ends in * stands by.
func newRig(t testing.TB, names []string, change func(*group.Config)) *rig {
	t.Helper()
	r := &rig{t: t, hsms: map[string]*hsm{}}
	cfg := group.Config{Name: "g", Logger: hclog.NewNullLogger(), OnEvent: r.note}
	for _, name := range names {
		standby := name[len(name)-1] == '*'
		if standby {
			name = name[:len(name)-1]
		}
		h := newHSM(name)
		r.hsms[name] = h
		cfg.Members = append(cfg.Members, group.MemberConfig{Name: name, Driver: "fake", Standby: standby, Connect: h.connect})
	}
	if change != nil {
		change(&cfg)
	}
	g, err := group.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Group = g
	return r
}

// start starts the rig's group, and closes it at the end of the test.
func (r *rig) start() *rig {
	r.t.Helper()
	if err := r.Start(context.Background()); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(r.Close)
	return r
}

func (r *rig) note(e api.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

// told returns how often a member went from one state to another.
func (r *rig) told(member string, from, to api.MemberState) int {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, e := range r.events {
		if e.Type == api.EventMember && e.Member == member && e.From == string(from) && e.To == string(to) {
			n++
		}
	}
	return n
}

// path returns the states that a member went through.
func (r *rig) path(member string) []string {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	var states []string
	for _, e := range r.events {
		if e.Type == api.EventMember && e.Member == member {
			states = append(states, e.To)
		}
	}
	return states
}

func (r *rig) member(name string) api.Member {
	r.t.Helper()
	for _, m := range r.Status().Members {
		if m.Name == name {
			return m
		}
	}
	r.t.Fatalf("no member %s in the status", name)
	return api.Member{}
}

func (r *rig) wantState(name string, want api.MemberState) {
	r.t.Helper()
	synctest.Wait()
	if m := r.member(name); m.State != want {
		r.t.Fatalf("member %s is %s (%s), want %s", name, m.State, m.Reason, want)
	}
}

func (r *rig) wantGroup(want api.GroupState) {
	r.t.Helper()
	if got := r.Status().State; got != want {
		r.t.Fatalf("the group is %s, want %s", got, want)
	}
}

var encrypt = pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Input: []byte("secret"), IV: make([]byte, 12)}

// do runs one command and returns the member that answered.
func (r *rig) do() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	res, err := r.Do(ctx, encrypt)
	return string(res.Output), err
}

func (r *rig) mustDo() string {
	r.t.Helper()
	by, err := r.do()
	if err != nil {
		r.t.Fatalf("a command failed: %v", err)
	}
	return by
}

func keyID(n int) (id pluginproto.KeyID) {
	copy(id[:], fmt.Sprintf("%016d", n))
	return id
}

// elapse lets the fake clock of a synctest bubble go on.
func elapse(d time.Duration) { time.Sleep(d) }
