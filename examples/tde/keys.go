package tde

import (
	"context"

	"kmsd/kms/api"
)

// Keys is what a database asks of kmsd. Both kms.KMS (the HSMs in this process) and
// client.Client (kmsd over HTTP) have these methods.
type Keys interface {
	// CreateMasterKey makes a key that never leaves the HSMs.
	CreateMasterKey(ctx context.Context, name string, opts api.KeyOptions) (api.Key, error)
	// DataKey returns n random bytes, in the clear and wrapped with the master key.
	// Unwrap needs the same aad again.
	DataKey(ctx context.Context, name string, n int, aad []byte) (api.DataKey, error)
	Unwrap(ctx context.Context, name string, wrapped, aad []byte) ([]byte, error)
	// Rotate makes the next version of the master key. Older ones still unwrap.
	Rotate(ctx context.Context, name string) (int, error)
	// Rewrap moves a wrapped key to the newest version; nobody sees it in the clear.
	Rewrap(ctx context.Context, name string, wrapped, aad []byte) ([]byte, error)
}
