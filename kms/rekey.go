package kms

import (
	"context"

	"kmsd/kms/api"
)

// Rekey begins to wrap every data key of a database under a new version of its master key.
func (k *KMS) Rekey(ctx context.Context, database string, opts api.RekeyOptions) (api.Job, error) {
	return api.Job{}, errNotYet
}

// Job returns how far a job is.
func (k *KMS) Job(ctx context.Context, id string) (api.Job, error) { return api.Job{}, errNotYet }
