package daemon

import (
	"context"
	"crypto/tls"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/cmd/kmsd/internal/config"
	"kmsd/cmd/kmsd/internal/vaultkv"
)

// NewBounded makes a listener that takes so many connections and no more.
var NewBounded = newBounded

// Gate is the listener for databases.
type Gate struct{ *gate }

// NewGate makes one for ten connections.
func NewGate(addr string, databases []string, s groups, h *vaultkv.Handler, conf *tls.Config, log hclog.Logger) Gate {
	return Gate{newGate(addr, databases, s, h, conf, 10, log)}
}

// Patient makes the gate look at nothing but events.
func (g Gate) Patient() { g.openPause, g.closePause = time.Hour, time.Hour }

// Run is what the daemon does with it.
func (g Gate) Run(ctx context.Context, closed func()) error { return g.run(ctx, closed) }

// Follow tells it which databases are behind the mounts.
func (g Gate) Follow(databases ...string) { g.follow(databases) }

// Serving is what the metrics say of it.
func (g Gate) Serving() bool { return g.serving.Load() }

// Await waits for the first opening.
func (g Gate) Await(ctx context.Context) error { return g.await(ctx) }

// TellEnds has what watches certificates look at them at several times, one after the other.
func TellEnds(files config.TLS, log hclog.Logger, times ...time.Time) error {
	c, err := newCertificates(files)
	if err != nil {
		return err
	}
	for _, at := range times {
		c.tellEnd(log, at)
	}
	return nil
}
