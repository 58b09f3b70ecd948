package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

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
	groups := service.Status().Groups
	return groups, service.Close()
}
