package kms

import (
	"context"

	"kmsd/kms/api"
)

// PutNamedKey makes the first or the next version of a data key.
func (k *KMS) PutNamedKey(ctx context.Context, database, id string, put api.NamedKeyPut) (api.NamedKey, error) {
	return api.NamedKey{}, errNotYet
}

// RotateNamedKey makes the next version of a data key in an HSM.
func (k *KMS) RotateNamedKey(ctx context.Context, database, id string) (api.NamedKey, error) {
	return api.NamedKey{}, errNotYet
}

// NamedKey returns a version of a data key.
func (k *KMS) NamedKey(ctx context.Context, database, id string, version int) (api.NamedKey, error) {
	return api.NamedKey{}, errNotYet
}

// DescribeNamedKey returns the newest version of a data key without its plaintext.
func (k *KMS) DescribeNamedKey(ctx context.Context, database, id string) (api.NamedKey, error) {
	return api.NamedKey{}, errNotYet
}

// NamedKeys lists data keys.
func (k *KMS) NamedKeys(ctx context.Context, database string, opts api.ListOptions) (api.NamedKeyPage, error) {
	return api.NamedKeyPage{}, errNotYet
}

// DeleteNamedKey marks the newest version of a data key as deleted.
func (k *KMS) DeleteNamedKey(ctx context.Context, database, id string) error { return errNotYet }
