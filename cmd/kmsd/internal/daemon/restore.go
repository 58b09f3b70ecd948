package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"kmsd/cmd/kmsd/internal/config"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog/boltcat"
)

// Restore brings a backup to the members of a configuration, and puts the catalog in
// its place when all of that is done. Then it opens kmsd on it, without serving, so
// that every member is compared with the catalog, and returns the groups as they are.
// No server may run on that catalog.
func Restore(ctx context.Context, cfg *config.Config, file kms.BackupFile) (report kms.RestoreReport, groups []api.Group, err error) {
	draft, err := boltcat.NewDraft(cfg.Catalog.Bolt.Path)
	if err != nil {
		return kms.RestoreReport{}, nil, err
	}
	defer func() { err = errors.Join(err, draft.Discard()) }()
	if report, err = kms.Restore(ctx, cfg.KMS(draft, nil), file); err != nil {
		return kms.RestoreReport{}, nil, err
	}
	if err := draft.Commit(); err != nil {
		return kms.RestoreReport{}, nil, err
	}
	if groups, err = compare(ctx, cfg); err != nil {
		return report, nil, fmt.Errorf("comparing the members with the catalog, which is restored: %w", err)
	}
	return report, groups, nil
}

// compare opens kmsd until every member is in step or away.
func compare(ctx context.Context, cfg *config.Config) (_ []api.Group, err error) {
	store, err := boltcat.Open(cfg.Catalog.Bolt.Path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	service, err := kms.Open(ctx, cfg.KMS(store, nil))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, service.Close()) }()
	return settled(ctx, service, coming)
}

// coming reports whether a member of the group is yet to be compared.
func coming(g api.Group) bool {
	return slices.ContainsFunc(g.Members, func(m api.Member) bool {
		return m.State == api.MemberProbing || m.State == api.MemberSyncing
	})
}
