package kms

import (
	"context"

	"kmsd/kms/api"
)

// Sync compares every member in step with the catalog and mends what differs.
func (k *KMS) Sync(ctx context.Context, groupName string, opts api.SyncOptions) (api.SyncReport, error) {
	return api.SyncReport{}, translate("synchronizing", errNotYet)
}

// Reinitialize makes an attempt now to bring back every member that is away.
func (k *KMS) Reinitialize(ctx context.Context, groupName string) (api.Group, error) {
	return api.Group{}, translate("reinitializing", errNotYet)
}
