package config

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms"
	"kmsd/kms/catalog"
)

// KMS says the configuration in the words of package kms.
func (cfg *Config) KMS(store catalog.Store, log hclog.Logger) kms.Config {
	out := kms.Config{Catalog: store, DriverDir: cfg.DriverDir, Logger: log, Enlist: cfg.Enlist, Formats: cfg.Vault.Formats(), Insecure: cfg.insecure()}
	for _, g := range cfg.Groups {
		out.Groups = append(out.Groups, cfg.group(g))
	}
	return out
}

// insecure reports whether drivers run whose sum is not given: only kmsd dev loads a
// configuration without sums.
func (cfg *Config) insecure() bool {
	return slices.ContainsFunc(cfg.Groups, func(g Group) bool {
		return slices.ContainsFunc(g.Members, func(m Member) bool { return m.SHA256 == "" })
	})
}

func (cfg *Config) group(g Group) kms.GroupConfig {
	out := kms.GroupConfig{
		Name:           g.Name,
		Domain:         cfg.secret(g.Domain, "the domain secret of group "+g.Name),
		MinCopies:      g.MinCopies,
		CommandTimeout: g.CommandTimeout,
		ProbeInterval:  g.ProbeInterval,
		NoHedge:        g.Hedge != nil && !*g.Hedge,
		PlainCount:     g.Balance == "count",
		Recovery:       kms.RecoveryConfig{Manual: g.Recovery.Mode == "manual", Interval: g.Recovery.Interval, Retries: -1},
	}
	if r := g.Recovery.Retries; r != nil {
		out.Recovery.Retries = *r
		out.Recovery.Manual = out.Recovery.Manual || *r == 0
	}
	for _, m := range g.Members {
		out.Members = append(out.Members, cfg.member(m))
	}
	return out
}

func (cfg *Config) member(m Member) kms.MemberConfig {
	return kms.MemberConfig{
		Name:     m.Name,
		Driver:   m.Driver,
		SHA256:   m.SHA256,
		Standby:  m.Standby,
		PIN:      cfg.secret(m.PIN, "the PIN of member "+m.Name),
		Settings: m.Settings,
		Source:   m.PIN.source(),
	}
}

// Sound returns what of a configuration with faults can be tried: the members in
// whose own entries there is none, in groups that are as plain as can be. A group
// whose domain secret has a fault gets another for the occasion, because the PIN and
// the token of a member can be right or wrong all the same. When there is something
// wrong with the whole file, nothing of it is run.
func (cfg *Config) Sound() *Config {
	out := *cfg
	out.Groups, out.Vault = nil, Vault{}
	if slices.ContainsFunc(cfg.faults, func(f Fault) bool { return f.Path == "" }) || cfg.faults.Has("driver_dir") {
		return &out
	}
	for _, g := range cfg.Groups {
		plain := Group{Name: g.Name, Domain: g.Domain, at: g.at, Recovery: Recovery{Mode: "manual"}}
		if cfg.faults.Has(g.at + ".name") {
			plain.Name = g.at
		}
		if cfg.faults.Has(g.at + ".domain") {
			plain.Domain = Secret{standIn: []byte(rand.Text() + rand.Text())}
		}
		if !cfg.faults.Has(g.at + ".command_timeout") {
			plain.CommandTimeout = g.CommandTimeout
		}
		for _, m := range g.Members {
			if !cfg.faults.Has(m.at) && len(plain.Members) < maxMembers {
				plain.Members = append(plain.Members, m)
			}
		}
		if len(plain.Members) > 0 {
			out.Groups = append(out.Groups, plain)
		}
	}
	return &out
}

// secret reads s anew on every call, so that a changed PIN needs no restart.
func (cfg *Config) secret(s Secret, what string) kms.Secret {
	return func(ctx context.Context) ([]byte, error) {
		b, err := s.read(ctx, cfg.environ)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", what, err)
		}
		return b, nil
	}
}
