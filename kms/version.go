package kms

import (
	"context"

	"kmsd/kms/api"
)

// ChangeVersion changes the state of one version of a key.
func (k *KMS) ChangeVersion(ctx context.Context, key string, version int, change api.VersionChange) (api.Key, error) {
	return api.Key{}, errNotYet
}
