package kms

import (
	"context"

	"kmsd/kms/api"
)

var _ api.Databases = (*KMS)(nil)

var errNotYet = api.NewError(api.CodeInternal, "not built yet", nil)

// CreateDatabase makes a database.
func (k *KMS) CreateDatabase(ctx context.Context, name string, opts api.DatabaseOptions) (api.Database, error) {
	return api.Database{}, errNotYet
}

// Database shows a database.
func (k *KMS) Database(ctx context.Context, name string) (api.Database, error) {
	return api.Database{}, errNotYet
}

// Databases lists databases by name.
func (k *KMS) Databases(ctx context.Context, opts api.ListOptions) (api.DatabasePage, error) {
	return api.DatabasePage{}, errNotYet
}
