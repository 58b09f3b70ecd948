package daemon

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"sync/atomic"
	"time"

	"kmsd/cmd/kmsd/internal/audit"
	"kmsd/cmd/kmsd/internal/config"
	"kmsd/cmd/kmsd/internal/httpapi"
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
	s.use(next)
	s.recordMembers(old, next)
	ctx, cancel := context.WithTimeout(ctx, reloadTime)
	defer cancel()
	left, err := s.service.Reconfigure(ctx, next.KMS(nil, nil).Groups)
	for _, what := range append(fixed(s.started, next), left...) {
		s.log.Warn("not changed by reading the configuration anew", "what", what)
	}
	if err != nil {
		s.use(old)
	}
	return err
}

// use puts into force what of a configuration needs no HSM.
func (s *server) use(cfg *config.Config) {
	s.current.cfg.Store(cfg)
	if s.vault != nil && cfg.Vault.Listen == "" {
		return // the listener stays until a restart, and all that is behind its mounts
	}
	s.service.SetFormats(cfg.Vault.Formats())
	s.vault.follow(cfg.Vault)
}

// record writes down what a signal has asked for. There is nobody to refuse it to.
func (s *server) record(r audit.Record, err error) {
	r.Remote, r.Action, r.Outcome = "signal", "reload", "ok"
	if err != nil {
		r.Outcome = "failed"
	}
	if err := s.audit.Write(r); err != nil {
		s.log.Error("the audit log cannot be written", "operation", r.Operation, "error", err)
	}
}

// recordMembers writes down which entries of members a new configuration changes, before
// they are followed. How that ends is in the HA log.
func (s *server) recordMembers(old, next *config.Config) {
	was, is := entries(old), entries(next)
	for _, at := range slices.SortedFunc(maps.Keys(is), place.compare) {
		m, operation := is[at], "add"
		if before, there := was[at]; there {
			if operation = "change"; m.Same(before) {
				continue
			}
		}
		s.record(audit.Record{Operation: operation, Group: at.group, Member: at.member, Spec: httpapi.Describe(api.MemberSpec{
			Driver: m.Driver, SHA256: m.SHA256, Standby: m.Standby, PIN: api.PINSource{File: m.PIN.File}, Settings: m.Settings,
		})}, nil)
	}
	for _, at := range slices.SortedFunc(maps.Keys(was), place.compare) {
		if _, stays := is[at]; !stays {
			s.record(audit.Record{Operation: "remove", Group: at.group, Member: at.member}, nil)
		}
	}
}

// place is where a member belongs.
type place struct{ group, member string }

func (p place) compare(other place) int {
	return cmp.Or(cmp.Compare(p.group, other.group), cmp.Compare(p.member, other.member))
}

func entries(cfg *config.Config) map[place]config.Member {
	all := make(map[place]config.Member)
	for _, g := range cfg.Groups {
		for _, m := range g.Members {
			all[place{g.Name, m.Name}] = m
		}
	}
	return all
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
		{"vault.listen", old.Vault.Listen, next.Vault.Listen},
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
