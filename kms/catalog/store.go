package catalog

import (
	"context"
	"errors"
	"iter"
)

// Errors of a Store.
var (
	// ErrNotFound: there is no such record.
	ErrNotFound = errors.New("no such record")
	// ErrConflict: a record has another revision than the change expects; read
	// again and decide anew. Nothing was changed.
	ErrConflict = errors.New("the record was changed meanwhile")
	// ErrInUse: another process has the store. The text says which.
	ErrInUse = errors.New("the catalog is in use by another process")
)

// Kind is a family of records.
type Kind string

const (
	KindKey       Kind = "key"
	KindIntent    Kind = "intent"
	KindTombstone Kind = "tombstone"
)

// Record is one record as a Store sees it: bytes with a revision.
type Record struct {
	Kind  Kind
	ID    string
	Rev   uint64 // of the store when the record was last written; 0 means it does not exist
	Value []byte // JSON; nil deletes
}

// Store keeps records durably. It is all that a back end implements; what the
// records mean is [Catalog]'s. All methods may be called concurrently.
type Store interface {
	// Get returns one record, or ErrNotFound.
	Get(ctx context.Context, kind Kind, id string) (Record, error)
	// List yields the records of a kind whose ID starts with prefix and is greater
	// than after, in the order of their IDs, as they were at one moment.
	List(ctx context.Context, kind Kind, prefix, after string) iter.Seq2[Record, error]
	// Apply writes all of the records or none, each only if the store holds it at
	// Rev (0: not at all), and returns the new revision. When Apply returns nil the
	// change survives a crash.
	Apply(ctx context.Context, changes ...Record) (uint64, error)
	// Rev is the revision of the last Apply that succeeded.
	Rev(ctx context.Context) (uint64, error)
	Close() error
}
