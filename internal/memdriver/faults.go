package memdriver

import (
	"context"
	"slices"
	"time"

	"kmsd/pluginproto"
)

// Call names a method of the Driver, for a script.
type Call string

const (
	CallOpen          Call = "open"
	CallList          Call = "list"
	CallInspect       Call = "inspect"
	CallGenerate      Call = "generate"
	CallSetAttributes Call = "set attributes"
	CallDestroy       Call = "destroy"
	CallCloneStep     Call = "clone step"
	CallDo            Call = "do"
	CallFacts         Call = "facts"
)

// Fault says what happens to the calls it fits, before they are done: first the
// delay, then the hang, then the error.
type Fault struct {
	// Call is the call it fits; empty fits every one.
	Call Call
	// Op is the operation it fits; zero fits every one. With it, only Do fits.
	Op pluginproto.Op
	// Many makes it fit only commands with items, as those of a driver that knows none.
	Many bool
	// Times is how many calls it happens to; zero means until [Driver.Clear].
	Times int
	// Delay is waited for.
	Delay time.Duration
	// Hang is waited for until it is closed, or the call's context ends.
	Hang <-chan struct{}
	// Err is what the call answers with; nil lets it go on as usual.
	Err error
}

// Script adds a fault. The first one that fits a call is the one that happens.
func (d *Driver) Script(f Fault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults = append(d.faults, &f)
}

// Clear forgets all faults. A call that hangs already goes on hanging.
func (d *Driver) Clear() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults = nil
}

// LoseSessions makes every call from now on fail with ClassMember and
// CKR_SESSION_HANDLE_INVALID, as a driver does after its one attempt to log in
// again.
func (d *Driver) LoseSessions() {
	const sessionHandleInvalid = 0xB3 // PKCS#11 2.40, pkcs11t.h
	d.lose(&pluginproto.Error{Class: pluginproto.ClassMember, CKR: sessionHandleInvalid, Op: "using token " + d.token.label})
}

// Crash ends the driver as a segmentation fault would: calls under way and all later
// ones fail with ClassMember, and Done is closed.
func (d *Driver) Crash() {
	d.lose(&pluginproto.Error{
		Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError,
		Op: "calling the driver of " + d.token.label, Msg: "the driver process is gone",
	})
	d.ended.Do(func() { close(d.done) })
}

// Kill is Crash, from a supervisor.
func (d *Driver) Kill() { d.Crash() }

// Done is closed when the driver has crashed or was killed.
func (d *Driver) Done() <-chan struct{} { return d.done }

// PID returns a number that no other Driver of this token has had.
func (d *Driver) PID() int { return d.pid }

// Calls returns how often a method was called.
func (d *Driver) Calls(c Call) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counts[c]
}

func (d *Driver) lose(why error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lost == nil {
		d.lost = why
	}
}

// change runs what changes the token, unless the driver is lost: what a process has
// begun ends with it, so nothing comes to a token from a driver that was killed.
func (d *Driver) change(what func()) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lost != nil {
		return d.lost
	}
	what()
	return nil
}

// begin is the start of every call: it counts, and lets the scripted fault happen.
func (d *Driver) begin(ctx context.Context, c Call, cmd pluginproto.Command) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	d.mu.Lock()
	d.counts[c]++
	f := d.pickFaultLocked(c, cmd)
	d.mu.Unlock()
	if f != nil {
		if err := d.suffer(ctx, f); err != nil {
			return err
		}
	}
	return d.broken(c)
}

// suffer waits as the fault says. A crash ends every wait.
func (d *Driver) suffer(ctx context.Context, f *Fault) error {
	if f.Delay > 0 {
		if err := d.pause(ctx, f.Delay); err != nil {
			return err
		}
	}
	if f.Hang != nil {
		select {
		case <-f.Hang:
		case <-d.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	select {
	case <-d.done:
		return nil // broken says why
	default:
		return f.Err
	}
}

// broken says why the driver can do nothing any more, nil while it can.
func (d *Driver) broken(c Call) error {
	d.mu.Lock()
	lost, open := d.lost, d.open
	d.mu.Unlock()
	switch {
	case lost != nil:
		return lost
	case c == CallOpen:
		return nil
	case !open:
		return pluginproto.Errorf(pluginproto.ClassMember, "using token "+d.token.label, "the driver is not open")
	case !d.token.reachable():
		e := &pluginproto.Error{
			Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError,
			Op: "using token " + d.token.label,
		}
		d.lose(e)
		return e
	}
	return nil
}

func (d *Driver) pickFaultLocked(c Call, cmd pluginproto.Command) *Fault {
	for i, f := range d.faults {
		if f.Call != "" && f.Call != c || f.Op != 0 && (c != CallDo || f.Op != cmd.Op) || f.Many && len(cmd.Items) == 0 {
			continue
		}
		happens := *f
		if f.Times > 0 {
			if f.Times--; f.Times == 0 {
				d.faults = slices.Delete(d.faults, i, i+1)
			}
		}
		return &happens
	}
	return nil
}

// pause waits for a time, for the end of the context or for the driver's.
func (d *Driver) pause(ctx context.Context, t time.Duration) error {
	if t <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-d.done:
		return nil // broken says why
	case <-ctx.Done():
		return ctx.Err()
	}
}
