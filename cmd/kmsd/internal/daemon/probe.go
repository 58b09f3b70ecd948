package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"kmsd/cmd/kmsd/internal/config"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog/boltcat"
)

// Probe connects to every member of a configuration as a server would, and returns
// what was found. The catalog is an empty one of its own: nothing is written to a
// token, and what is on it is left alone. A wrong PIN costs one try.
func Probe(ctx context.Context, cfg *config.Config) (_ []api.Group, err error) {
	dir, err := os.MkdirTemp("", "kmsd-check-")
	if err != nil {
		return nil, fmt.Errorf("making a catalog to check with: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	store, err := boltcat.Open(filepath.Join(dir, "catalog.db"))
	if err != nil {
		return nil, fmt.Errorf("making a catalog to check with: %w", err)
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	service, err := kms.Open(ctx, cfg.KMS(store, nil))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, service.Close()) }()
	ctx, cancel := context.WithTimeout(ctx, longest)
	defer cancel()
	groups, _ := settled(ctx, service, underWay)
	return groups, nil
}

const (
	// lookAgain is how often members are looked at that are waited for.
	lookAgain = 100 * time.Millisecond
	// longest is when to stop waiting for first attempts, which end by themselves after 30 s.
	longest = 40 * time.Second
)

// settled returns the groups when none of them is busy any more, or as they are when ctx ends,
// with its error.
func settled(ctx context.Context, service *kms.KMS, busy func(api.Group) bool) ([]api.Group, error) {
	look := time.NewTicker(lookAgain)
	defer look.Stop()
	for {
		groups := service.Status().Groups
		if !slices.ContainsFunc(groups, busy) {
			return groups, nil
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return groups, ctx.Err()
		}
	}
}

// underWay reports whether the first attempt at a member of the group goes on: an HSM that
// takes its time is no fault.
func underWay(g api.Group) bool {
	return slices.ContainsFunc(g.Members, func(m api.Member) bool {
		return m.RecoveryAttempts <= 1 && (m.State == api.MemberProbing || m.State == api.MemberSyncing)
	})
}
