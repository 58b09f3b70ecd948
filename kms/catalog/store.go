package catalog

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
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
	// ErrSchema: it was written by a newer kmsd, in a form that this one does not
	// know. The text names the form.
	ErrSchema = errors.New("the catalog has an unknown form")
	// ErrDamaged: what was read is not what was written.
	ErrDamaged = errors.New("the catalog is damaged")
	// ErrTooLarge: a record or its ID is over its limit. Nothing was changed.
	ErrTooLarge = errors.New("the record is too large")
	// ErrFull: there is no room for a change. Nothing was changed; it can be tried again
	// when there is room.
	ErrFull = errors.New("the catalog has no room left")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("the catalog is closed")
)

// Limits that every Store keeps.
const (
	MaxID    = 512     // bytes of a record's ID, at least 1
	MaxValue = 1 << 20 // bytes of a record's value; an etcd request holds 1.5 MiB
	// BatchSize is how many records a caller should give to one Apply when they
	// could as well be written one by one. etcd takes 128 by default.
	BatchSize = 100
)

// Kind is a family of records.
type Kind string

const (
	KindKey       Kind = "key"
	KindIntent    Kind = "intent"
	KindTombstone Kind = "tombstone"
	KindMember    Kind = "member"

	KindDatabase    Kind = "database"
	KindDataKey     Kind = "datakey"     // a named data key with its newest version
	KindDataVersion Kind = "dataversion" // an older version of one
	KindJob         Kind = "job"
	KindUsage       Kind = "usage"
)

// Kinds lists every kind, in no meaningful order.
func Kinds() []Kind {
	return []Kind{
		KindKey, KindIntent, KindTombstone, KindMember, KindDatabase, KindDataKey, KindDataVersion, KindJob, KindUsage,
	}
}

// Record is one record as a Store sees it: bytes with a revision.
type Record struct {
	Kind  Kind
	ID    string
	Rev   uint64 // of the store when the record was last written, from 1; 0 means it does not exist
	Value []byte // JSON; nil deletes
	// Keep makes a change a mere condition: the record must be at Rev, and stays as
	// it is. Value is not looked at.
	Keep bool
}

// Store keeps records durably. It is all that a back end implements; what the
// records mean is [Catalog]'s. All methods may be called concurrently.
type Store interface {
	// Get returns one record, or ErrNotFound.
	Get(ctx context.Context, kind Kind, id string) (Record, error)
	// List yields up to limit records of a kind, 0 for all, whose ID starts with prefix
	// and is greater than after, in the order of their IDs, as they were at one moment. It
	// may hold all of them in memory.
	List(ctx context.Context, kind Kind, prefix, after string, limit int) iter.Seq2[Record, error]
	// Count returns how many records of a kind there are whose ID starts with prefix.
	Count(ctx context.Context, kind Kind, prefix string) (int, error)
	// Apply writes all of the records or none, each only if the store holds it at
	// Rev (0: not at all), and returns the new revision, which is the Rev of each of
	// them from now on. A record may be named once. When Apply returns nil the change
	// survives a crash. After ErrConflict, ErrTooLarge, ErrClosed or the error of a
	// context that ended, nothing was changed; after any other error the change may
	// have been made.
	Apply(ctx context.Context, changes ...Record) (uint64, error)
	// Rev is the revision of the last Apply that succeeded, 0 at first.
	Rev(ctx context.Context) (uint64, error)
	// Close waits for what has begun.
	Close() error
}

// CheckChanges returns what is wrong with the arguments of Apply in themselves.
// Every Store calls it first.
func CheckChanges(changes []Record) error {
	type name struct {
		kind Kind
		id   string
	}
	seen := make(map[name]bool, len(changes))
	for _, r := range changes {
		if err := CheckID(r.Kind, r.ID); err != nil {
			return err
		}
		if len(r.Value) > MaxValue {
			return fmt.Errorf("%s %q has %d bytes, at most %d are allowed: %w", r.Kind, r.ID, len(r.Value), MaxValue, ErrTooLarge)
		}
		n := name{r.Kind, r.ID}
		if seen[n] {
			return fmt.Errorf("%s %q is named twice in one change", r.Kind, r.ID)
		}
		seen[n] = true
	}
	return nil
}

// CheckID returns what is wrong with the name of a record.
func CheckID(kind Kind, id string) error {
	switch {
	case !slices.Contains(Kinds(), kind):
		return fmt.Errorf("unknown kind of record %q", kind)
	case id == "":
		return fmt.Errorf("a %s without an ID", kind)
	case len(id) > MaxID:
		return fmt.Errorf("the ID of a %s has %d bytes, at most %d are allowed: %w", kind, len(id), MaxID, ErrTooLarge)
	}
	return nil
}
