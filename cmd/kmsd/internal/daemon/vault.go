package daemon

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/cmd/kmsd/internal/audit"
	"kmsd/cmd/kmsd/internal/auth"
	"kmsd/cmd/kmsd/internal/config"
	"kmsd/cmd/kmsd/internal/vaultkv"
	"kmsd/kms/api"
)

// makeTime is what making the databases of a start may take.
const makeTime = 10 * time.Second

// keyholders lets package auth answer the question of package vaultkv. Clients of a
// Vault have nothing but their token.
type keyholders struct{ auth *auth.Auth }

func (k keyholders) Authenticate(ctx context.Context, token string) (vaultkv.Caller, error) {
	p, err := k.auth.Authenticate(ctx, auth.Credentials{Token: token})
	if err != nil {
		return nil, err
	}
	return p, nil
}

// vault is what databases reach over their own listener.
type vault struct {
	handler *vaultkv.Handler
	gate    *gate
}

// newVault returns nil when there is no such listener.
func (s *server) newVault(log hclog.Logger, observe func(action, outcome string, took time.Duration)) (*vault, error) {
	conf := s.started.Vault
	if conf.Listen == "" {
		return nil, nil
	}
	handler, err := vaultkv.New(vaultkv.Config{
		Keys: s.service, Auth: keyholders{s.auth}, Audit: s.audit, Mounts: mountsOf(conf), Logger: log, Observe: observe,
	})
	if err != nil {
		return nil, err
	}
	_, addr, err := config.ParseListen(conf.Listen)
	if err != nil {
		return nil, err
	}
	most, err := maxConnections()
	if err != nil {
		return nil, err
	}
	return &vault{handler, newGate(addr, databasesOf(conf), s.service, handler, s.certs.config(), most/2, log)}, nil
}

// follow shows the mounts of a changed configuration.
func (v *vault) follow(conf config.Vault) {
	if v == nil {
		return
	}
	v.handler.SetMounts(mountsOf(conf))
	v.gate.follow(databasesOf(conf))
}

// makeDatabases makes the databases that are to be there. One that cannot be made now is
// made at the next start.
func (s *server) makeDatabases(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, makeTime)
	defer cancel()
	for name, key := range s.opts.Databases {
		began := time.Now()
		err := s.makeDatabase(ctx, name, key)
		if errors.Is(err, api.ErrExists) {
			continue
		}
		r := audit.Record{
			Time: began, Remote: "start", Action: auth.ActionDatabaseCreate, Database: name, Key: key, Outcome: "ok", Duration: time.Since(began),
		}
		if err != nil {
			r.Outcome = string(api.AsError(err).Code)
			s.log.Warn("a database could not be made; the next start tries again", "database", name, "error", err)
		}
		if err := s.audit.Write(r); err != nil {
			s.log.Error("the audit log cannot be written", "operation", r.Action, "error", err)
		}
	}
}

// makeDatabase tries again as long as first attempts with members go on: a start does not
// wait for HSMs that are later than others, but the master key may need them.
func (s *server) makeDatabase(ctx context.Context, name, key string) error {
	look := time.NewTicker(lookAgain)
	defer look.Stop()
	for {
		coming := slices.ContainsFunc(s.service.Status().Groups, underWay)
		_, err := s.service.CreateDatabase(ctx, name, api.DatabaseOptions{Key: key})
		if !coming || !errors.Is(err, api.ErrInsufficientCopies) && !errors.Is(err, api.ErrGroupLost) {
			return err
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return err
		}
	}
}

func mountsOf(conf config.Vault) map[string]vaultkv.Mount {
	out := make(map[string]vaultkv.Mount, len(conf.Mounts))
	for name, m := range conf.Mounts {
		out[name] = vaultkv.Mount(m)
	}
	return out
}

func databasesOf(conf config.Vault) []string {
	names := make(map[string]bool)
	for _, m := range conf.Mounts {
		names[m.Database] = true
	}
	return slices.Collect(maps.Keys(names))
}
