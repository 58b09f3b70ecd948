package kms

import (
	"context"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/internal/group"
	"kmsd/kms/internal/supervisor"
	"kmsd/pluginproto"
)

// connector opens the members' drivers and sees to it that no PIN is tried twice
// in vain.
type connector struct {
	driverDir string
	insecure  bool
	log       hclog.Logger
	pins      *pins
	tasks     *sync.WaitGroup // in-process drivers that are being closed
}

// connect starts and opens a member's driver. It is called for every recovery, so
// it reads the secrets anew, and looks at the PIN before it starts anything.
func (c *connector) connect(ctx context.Context, g GroupConfig, m MemberConfig, trip *atomic.Int64) (_ group.Conn, _ pluginproto.TokenInfo, err error) {
	slot := slotOf(g.Name, m)
	var req pluginproto.OpenRequest
	defer func() { clear(req.PIN); clear(req.Domain) }()
	if req, err = c.secrets(ctx, g, m); err != nil {
		return nil, pluginproto.TokenInfo{}, err
	}
	if err := c.pins.check(slot, m.Name, req.PIN); err != nil {
		return nil, pluginproto.TokenInfo{}, err
	}
	conn, err := c.start(ctx, g, m)
	if err != nil {
		return nil, pluginproto.TokenInfo{}, err
	}
	defer func() {
		if err != nil {
			conn.Kill()
		}
	}()
	info, err := conn.Open(ctx, req)
	c.pins.note(slot, req.PIN, err)
	if err != nil {
		return nil, pluginproto.TokenInfo{}, err
	}
	trip.Store(0) // the proof of an earlier connection says nothing about this one
	return &watched{Conn: conn, trip: trip}, info, nil
}

// secrets reads what Open needs. A secret that cannot be read is the operator's to
// mend; it is read again at the next attempt.
func (c *connector) secrets(ctx context.Context, g GroupConfig, m MemberConfig) (req pluginproto.OpenRequest, err error) {
	defer func() {
		if err != nil {
			clear(req.PIN)
			clear(req.Domain)
		}
	}()
	op := "reading the secrets of member " + m.Name
	req.Settings = m.Settings
	if m.PIN != nil {
		if req.PIN, err = m.PIN(ctx); err != nil {
			return req, pluginproto.Errorf(pluginproto.ClassMember, op, "its PIN: %v", err)
		}
	}
	if req.Domain, err = g.Domain(ctx); err != nil {
		return req, pluginproto.Errorf(pluginproto.ClassMember, op, "the domain secret: %v", err)
	}
	if len(req.Domain) < minDomain {
		return req, pluginproto.Errorf(pluginproto.ClassMember, op,
			"the domain secret has %d bytes, want at least %d", len(req.Domain), minDomain)
	}
	return req, nil
}

// start returns a driver that runs and is not opened yet.
func (c *connector) start(ctx context.Context, g GroupConfig, m MemberConfig) (group.Conn, error) {
	if m.Open != nil {
		d, err := m.Open(ctx)
		if err != nil {
			return nil, err
		}
		return newInProcess(d, c.tasks), nil
	}
	sum, err := hex.DecodeString(m.SHA256)
	if err != nil {
		return nil, fmt.Errorf("reading the SHA-256 of driver %s: %w", m.Driver, err)
	}
	p, err := supervisor.Start(ctx, supervisor.Spec{
		Name:           m.Name,
		Path:           filepath.Join(c.driverDir, "kmsd-driver-"+m.Driver),
		SHA256:         sum,
		Insecure:       c.insecure,
		Logger:         c.log.Named(m.Name),
		CommandTimeout: g.CommandTimeout,
	})
	if err != nil {
		return nil, err
	}
	return p, nil
}

// lastTrip reads what a watched connection has noted; zero when it never did.
func lastTrip(trip *atomic.Int64) time.Time {
	if n := trip.Load(); n != 0 {
		return time.Unix(0, n)
	}
	return time.Time{}
}
