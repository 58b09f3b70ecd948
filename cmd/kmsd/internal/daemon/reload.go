package daemon

import (
	"context"
	"fmt"
	"reflect"
	"sync/atomic"
	"time"

	"kmsd/cmd/kmsd/internal/config"
	"kmsd/kms"
	"kmsd/kms/api"
)

// reloadTime is what the members of all groups together get to follow a changed
// configuration: one after the other is drained, connected and brought in step.
const reloadTime = 10 * time.Minute

// current is the configuration that is in force.
type current struct{ cfg atomic.Pointer[config.Config] }

func newCurrent(cfg *config.Config) *current {
	c := new(current)
	c.cfg.Store(cfg)
	return c
}

// enlist asks the configuration of now about a member that joins at run time.
func (c *current) enlist(group string, spec api.MemberSpec) (kms.MemberConfig, error) {
	return c.cfg.Load().Enlist(group, spec)
}

// reloadConfig reads the file anew and brings the groups in line with it. A file with
// faults changes nothing. Serving goes on.
func (s *server) reloadConfig(ctx context.Context) error {
	next, err := s.opts.Load()
	if err != nil {
		return err
	}
	old := s.current.cfg.Load()
	for _, w := range next.Warnings {
		s.log.Warn(w)
	}
	s.log.SetLevel(level(next.Log.Level))
	s.current.cfg.Store(next)
	ctx, cancel := context.WithTimeout(ctx, reloadTime)
	defer cancel()
	left, err := s.service.Reconfigure(ctx, next.KMS(nil, nil).Groups)
	for _, what := range append(fixed(s.started, next), left...) {
		s.log.Warn("not changed by reading the configuration anew", "what", what)
	}
	if err != nil {
		s.current.cfg.Store(old)
	}
	return err
}

// fixed names what differs from the configuration that kmsd was started with and is fixed
// while it runs, beside what package kms knows.
func fixed(old, next *config.Config) []string {
	var changed []string
	for _, v := range []struct {
		name      string
		old, next any
	}{
		{"listen", old.Listen, next.Listen},
		{"tls", old.TLS, next.TLS},
		{"catalog", old.Catalog, next.Catalog},
		{"driver_dir", old.DriverDir, next.DriverDir},
		{"auth", old.Auth, next.Auth},
		{"audit", old.Audit, next.Audit},
	} {
		if !reflect.DeepEqual(v.old, v.next) {
			changed = append(changed, v.name+" has changed: it needs a restart")
		}
	}
	for _, g := range next.Groups {
		for _, was := range old.Groups {
			if was.Name == g.Name && !reflect.DeepEqual(was.Domain, g.Domain) {
				changed = append(changed, fmt.Sprintf("where the domain secret of group %s is kept has changed: it needs a restart", g.Name))
			}
		}
	}
	return changed
}
