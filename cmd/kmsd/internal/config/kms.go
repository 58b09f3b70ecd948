package config

import (
	"context"
	"fmt"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms"
	"kmsd/kms/catalog"
)

// KMS says the configuration in the words of package kms.
func (cfg *Config) KMS(store catalog.Store, log hclog.Logger) kms.Config {
	out := kms.Config{Catalog: store, DriverDir: cfg.DriverDir, Logger: log}
	for _, g := range cfg.Groups {
		group := kms.GroupConfig{
			Name:           g.Name,
			Domain:         cfg.secret(g.Domain, "the domain secret of group "+g.Name),
			MinCopies:      g.MinCopies,
			CommandTimeout: g.CommandTimeout,
			ProbeInterval:  g.ProbeInterval,
			NoHedge:        g.Hedge != nil && !*g.Hedge,
			Recovery: kms.RecoveryConfig{
				Manual:   g.Recovery.Mode == "manual",
				Interval: g.Recovery.Interval,
				Retries:  g.Recovery.Retries,
			},
		}
		for _, m := range g.Members {
			group.Members = append(group.Members, kms.MemberConfig{
				Name:     m.Name,
				Driver:   m.Driver,
				SHA256:   m.SHA256,
				Standby:  m.Standby,
				PIN:      cfg.secret(m.PIN, "the PIN of member "+m.Name),
				Settings: m.Settings,
			})
			// Only kmsd dev loads a configuration without sums.
			out.Insecure = out.Insecure || m.SHA256 == ""
		}
		out.Groups = append(out.Groups, group)
	}
	return out
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
