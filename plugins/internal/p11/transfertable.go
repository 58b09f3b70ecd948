package p11

import (
	"context"
	"slices"
	"time"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

const (
	// maxTransfers is how many transfers wait for their next step in one driver: five for
	// each other member of the largest group, four that carry a key and one that carries many.
	maxTransfers = 160
	// idleTransfer is how long a transfer waits for its next step.
	idleTransfer = time.Minute
)

type transferID struct {
	transfer [16]byte
	role     pluginproto.CloneRole
}

func idOfTransfer(req pluginproto.CloneRequest) transferID {
	return transferID{req.Transfer, req.Role}
}

// transfer is one end of a transfer between its steps. It has a session of its own, for
// HSMs keep what they know of a transfer in the session that it goes on in.
type transfer struct {
	way    pluginproto.CloneProtocol
	keys   []pluginproto.KeyID
	handle pkcs11.SessionHandle
	step   int       // the next one
	used   time.Time // when the last one was

	// At the source.
	source  Source
	objects []pkcs11.ObjectHandle // what is secret of each key; 0: it is not given
	give    []pkcs11.ObjectHandle // what the target wants of them

	// At the target.
	target  Target
	offers  []offered
	coming  []int                     // which keys come, in order; more than are wanted where the source is not asked
	results []pluginproto.CloneResult // what has become of each key; empty: it is wanted
}

// close lets go of what the HSM keeps for a transfer.
func (t *transfer) close(c *conn) {
	if t.source != nil {
		t.source.Close()
	}
	if t.target != nil {
		t.target.Close()
	}
	if t.handle != 0 {
		_ = c.lib.CloseSession(t.handle)
	}
}

// The functions below call into the library: their callers hold the driver's lock. The
// worker of the rare lane is the only one who calls them while the connection lives.

// keepTransfer puts a transfer aside until its next step.
func (c *conn) keepTransfer(id transferID, t *transfer) {
	t.step++
	t.used = time.Now()
	c.transfers[id] = t
}

// makeRoom makes sure that another transfer can wait. One that nobody has gone on with for
// a while gives way. When there is none the new one has to come again: to end others that
// go on would keep them all from coming to an end.
func (c *conn) makeRoom(op string, idle time.Duration) error {
	if len(c.transfers) < maxTransfers {
		return nil
	}
	oldest := c.oldestTransfer()
	if time.Since(c.transfers[oldest].used) < idle {
		return pluginproto.Errorf(pluginproto.ClassBusy, op, "%d transfers are under way here already; try again when some have ended", maxTransfers)
	}
	c.endTransfer(oldest)
	return nil
}

func (c *conn) oldestTransfer() (oldest transferID) {
	var used time.Time
	for id, t := range c.transfers {
		if used.IsZero() || t.used.Before(used) {
			oldest, used = id, t.used
		}
	}
	return oldest
}

// endTransfer ends a transfer, if it is known.
func (c *conn) endTransfer(id transferID) {
	if t := c.transfers[id]; t != nil {
		delete(c.transfers, id)
		t.close(c)
	}
}

func (c *conn) endTransfers(idle time.Duration) {
	for id, t := range c.transfers {
		if time.Since(t.used) >= idle {
			c.endTransfer(id)
		}
	}
}

// takeTransfer returns the transfer that a step goes on with. It is no longer in the table:
// whoever takes it puts it back or closes it.
func (c *conn) takeTransfer(op string, req pluginproto.CloneRequest) (*transfer, error) {
	id := idOfTransfer(req)
	t := c.transfers[id]
	switch {
	case t == nil:
		return nil, pluginproto.Errorf(pluginproto.ClassUnknown, op,
			"the transfer is not known here, or not any more: it has ended, was left alone for too long, or the connection to the token was made anew; begin another")
	case t.step != req.Step || t.way.Name != req.Protocol || !slices.Equal(t.keys, req.Keys):
		c.endTransfer(id)
		return nil, pluginproto.Errorf(pluginproto.ClassCaller, op,
			"step %d of %s does not go on with the transfer, whose next is step %d of %s with %d keys", req.Step, req.Protocol, t.step, t.way.Name, len(t.keys))
	}
	delete(c.transfers, id)
	return t, nil
}

// leftAlone is after how long without a step a transfer gives way to another one.
func (d *Driver) leftAlone() time.Duration { return d.idle / 4 }

// sweepTransfers ends what nobody goes on with, until the driver is closed.
func (d *Driver) sweepTransfers() {
	tick := time.NewTicker(d.leftAlone())
	defer tick.Stop()
	for {
		select {
		case <-d.quit:
			return
		case <-tick.C:
		}
		_, err := call(context.Background(), d, d.rare, func(s *session) (struct{}, error) {
			return struct{}{}, s.read(func() error {
				s.c.endTransfers(d.idle)
				return nil
			})
		})
		if err != nil {
			return // the driver is closed, or finished
		}
	}
}
