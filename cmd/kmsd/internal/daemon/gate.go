package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"iter"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/cmd/kmsd/internal/vaultkv"
	"kmsd/kms/api"
)

const (
	// openPause is the time between two looks at a closed gate: whether a round trip has
	// succeeded, or the port is free.
	openPause = 100 * time.Millisecond
	// closePause is the time between two looks at an open one, beside those that an event
	// asks for.
	closePause = time.Second
	// firstOpening is how long a start waits for round trips that have not come back yet.
	firstOpening = 5 * time.Second
)

// gate is the listener for databases. It is there only while keys can be used: a database
// goes on with the keys that it has in memory when nobody listens, but not when it is
// told of a failure.
//
// It opens when a round trip has succeeded in a group that a mount uses, closes when
// none of these groups serves any more, and opens again on the same port.
type gate struct {
	service               groups
	handler               *vaultkv.Handler
	conf                  *tls.Config
	most                  int // connections at once
	log                   hclog.Logger
	openPause, closePause time.Duration

	databases chan []string  // behind the mounts, when they have changed
	opened    chan struct{}  // closed when it has been open once
	ending    sync.WaitGroup // openings whose requests are still under way
	serving   atomic.Bool    // whether it is open, for others to read

	// What follows is run's.
	used    map[string]string // :: database behind a mount → its group; "": not known yet
	addr    string            // HOST:PORT; a port of 0 is chosen once
	trouble string            // why it could not be opened; "": no reason
	open    *opening          // nil: closed
	before  bool              // it has been open once
}

// groups is what a gate needs to know of the service.
type groups interface {
	Ready() api.Readiness
	Status() api.Status
	Events(ctx context.Context) iter.Seq[api.Event]
	Database(ctx context.Context, name string) (api.Database, error)
}

// opening is one time for which the gate is open.
type opening struct {
	listener net.Listener
	server   *vaultkv.Server
	failed   chan struct{} // closed when the server serves no more and should
}

// newGate returns a closed gate for an address. most is how many connections it takes.
func newGate(addr string, databases []string, s groups, h *vaultkv.Handler, conf *tls.Config, most int, log hclog.Logger) *gate {
	g := &gate{
		service: s, handler: h, conf: conf, most: most, log: log, openPause: openPause, closePause: closePause, addr: addr,
		databases: make(chan []string, 1), opened: make(chan struct{}),
	}
	g.follow(databases)
	return g
}

// follow is told which databases are behind the mounts, at any time, but by one at a time.
func (g *gate) follow(databases []string) {
	select {
	case <-g.databases: // nobody has looked at those
	default:
	}
	g.databases <- databases
}

// run opens and closes the gate until ctx ends. Then it closes it, calls closed, and
// returns when the requests under way have ended.
func (g *gate) run(ctx context.Context, closed func()) error {
	events := wakes(g.service.Events(ctx))
	g.used = map[string]string{}
	for {
		g.adjust(ctx)
		pause, failed := g.openPause, (<-chan struct{})(nil)
		if g.open != nil {
			pause, failed = g.closePause, g.open.failed
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			g.shut("kmsd is being stopped")
			closed()
			g.ending.Wait()
			for range events { // until whoever sends them has ended too
			}
			return nil
		case databases := <-g.databases:
			g.forget(databases)
		case <-failed:
			g.shut("its listener has failed")
		case <-events:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// wakes tells that something has happened, as often as somebody looks. It is closed after
// the last event.
func wakes(events iter.Seq[api.Event]) <-chan struct{} {
	woken := make(chan struct{}, 1)
	go func() {
		defer close(woken)
		for e := range events {
			if e.Type != api.EventGroup && e.Type != api.EventMember && e.Type != api.EventDropped {
				continue
			}
			select {
			case woken <- struct{}{}:
			default:
			}
		}
	}()
	return woken
}

// forget keeps what is known of the databases that are still behind mounts.
func (g *gate) forget(databases []string) {
	next := make(map[string]string, len(databases))
	for _, name := range databases {
		next[name] = g.used[name]
	}
	g.used = next
}

// adjust opens or closes the gate, if it is time for it.
func (g *gate) adjust(ctx context.Context) {
	select {
	case databases := <-g.databases:
		g.forget(databases)
	default:
	}
	switch {
	case ctx.Err() != nil:
	case g.open == nil && g.canServe(ctx):
		g.unlock()
	case g.open != nil && g.isLost(ctx):
		g.shut("no group of HSMs that a mount uses serves")
	}
}

// canServe says whether a round trip has lately succeeded in a group that is used.
func (g *gate) canServe(ctx context.Context) bool {
	uses := g.uses(ctx)
	return slices.ContainsFunc(g.service.Ready().Members, func(m api.MemberReadiness) bool { return m.OK && uses(m.Group) })
}

// isLost says whether every group that is used is lost.
func (g *gate) isLost(ctx context.Context) bool {
	uses := g.uses(ctx)
	return !slices.ContainsFunc(g.service.Status().Groups, func(s api.Group) bool { return s.State != api.GroupLost && uses(s.Name) })
}

// uses says which groups the mounts need. A database that is still to be made may be in
// any of them.
func (g *gate) uses(ctx context.Context) func(group string) bool {
	unknown := false
	for name, group := range g.used {
		if group != "" {
			continue
		}
		db, err := g.service.Database(ctx, name)
		if err != nil {
			unknown = true
			continue
		}
		g.used[name] = db.Group // for ever: its master key does not move
	}
	return func(group string) bool {
		if unknown {
			return true
		}
		for _, used := range g.used {
			if used == group {
				return true
			}
		}
		return false
	}
}

// unlock opens the gate. What keeps it from that is logged once.
func (g *gate) unlock() {
	l, err := net.Listen("tcp", g.addr)
	if err != nil {
		if g.trouble != err.Error() {
			g.log.Error("the listener for databases cannot be opened; trying again", "listen", "https://"+g.addr, "error", err)
		}
		g.trouble = err.Error()
		return
	}
	g.trouble, g.addr = "", l.Addr().String()
	o := &opening{listener: l, server: vaultkv.NewServer(g.handler, g.conf, g.log), failed: make(chan struct{})}
	g.open = o
	g.serving.Store(true)
	g.ending.Go(func() {
		if err := o.server.Serve(newBounded(l, g.most)); err != nil && !errors.Is(err, net.ErrClosed) {
			g.log.Error("serving databases", "listen", "https://"+l.Addr().String(), "error", err)
			close(o.failed)
		}
	})
	g.log.Info("open for databases", "listen", "https://"+g.addr)
	if !g.before {
		g.before = true
		close(g.opened)
	}
}

// shut closes the gate and every connection that waits. Requests under way get their
// time to end.
func (g *gate) shut(why string) {
	o := g.open
	if o == nil {
		return
	}
	g.open = nil
	g.serving.Store(false)
	_ = o.listener.Close() // in this moment nobody comes in any more
	g.log.Warn("closed for databases", "listen", "https://"+g.addr, "reason", why)
	g.ending.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), drainTime)
		defer cancel()
		if err := o.server.End(ctx); err != nil && !errors.Is(err, net.ErrClosed) {
			g.log.Warn("requests of databases were broken off", "after", drainTime, "error", err)
		}
	})
}

// await waits until the gate has been open, but not where no group serves.
func (g *gate) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, firstOpening)
	defer cancel()
	tick := time.NewTicker(openPause)
	defer tick.Stop()
	for {
		lost := !slices.ContainsFunc(g.service.Status().Groups, func(s api.Group) bool { return s.State != api.GroupLost })
		if lost {
			return fmt.Errorf("waiting for the first opening: every group is lost")
		}
		select {
		case <-g.opened:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("waiting for the first opening: %w", ctx.Err())
		case <-tick.C:
		}
	}
}
