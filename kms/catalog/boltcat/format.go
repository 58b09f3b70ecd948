package boltcat

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"

	bolt "go.etcd.io/bbolt"

	"kmsd/kms/catalog"
)

// The bucket "meta" says what the file is:
//
//	magic   "kmsd catalog"
//	schema  "2"; "1" had no databases, and is raised by Open
//	rev     8 bytes, big-endian: the revision of the last Apply
var (
	metaBucket = []byte("meta")
	magicKey   = []byte("magic")
	schemaKey  = []byte("schema")
	revKey     = []byte("rev")

	magic  = []byte("kmsd catalog")
	schema = []byte("2")
	old    = []byte("1")
)

// A stored value is
//
//	 0          8           12                    n
//	┌──────────┬───────────┬──── ─ ─ ─ ─ ─ ──────┐
//	│ revision │ CRC-32C   │ value               │
//	└──────────┴───────────┴──── ─ ─ ─ ─ ─ ──────┘
//
// both numbers big-endian. bbolt has no check of its pages, and a bit that falls
// over in an identity would make a key unfindable; so the CRC covers the kind, the
// ID, the revision and the value.
const headSize = 8 + 4

// encode lays out a value for the bucket of its kind.
func encode(r catalog.Record) []byte {
	b := make([]byte, headSize, headSize+len(r.Value))
	binary.BigEndian.PutUint64(b, r.Rev)
	binary.BigEndian.PutUint32(b[8:], sum(r.Kind, []byte(r.ID), b[:8], r.Value))
	return append(b, r.Value...)
}

// decode reads what encode wrote and copies it: bbolt's memory is only valid
// inside its transaction.
func decode(kind catalog.Kind, id, stored []byte) (catalog.Record, error) {
	rev, value, err := parse(kind, id, stored)
	if err != nil {
		return catalog.Record{}, err
	}
	return catalog.Record{Kind: kind, ID: string(id), Rev: rev, Value: append([]byte{}, value...)}, nil
}

// parse reads what encode wrote without copying it.
func parse(kind catalog.Kind, id, stored []byte) (rev uint64, value []byte, err error) {
	if len(stored) < headSize || len(stored) > headSize+catalog.MaxValue {
		return 0, nil, fmt.Errorf("%s %q has %d bytes: %w", kind, id, len(stored), catalog.ErrDamaged)
	}
	value = stored[headSize:]
	if sum(kind, id, stored[:8], value) != binary.BigEndian.Uint32(stored[8:]) {
		return 0, nil, fmt.Errorf("%s %q does not match its check sum: %w", kind, id, catalog.ErrDamaged)
	}
	return binary.BigEndian.Uint64(stored), value, nil
}

// sum is called for every record that is read or written, and allocates nothing.
func sum(kind catalog.Kind, id, rev, value []byte) uint32 {
	crc := crc32.Update(kindSums[kind], table, id)
	crc = crc32.Update(crc, table, zero)
	crc = crc32.Update(crc, table, rev)
	return crc32.Update(crc, table, value)
}

var (
	table    = crc32.MakeTable(crc32.Castagnoli)
	zero     = []byte{0}
	kindSums = sumsOfKinds() // :: kind → check sum of its name and a zero; never changes
)

func sumsOfKinds() map[catalog.Kind]uint32 {
	sums := make(map[catalog.Kind]uint32)
	for _, kind := range catalog.Kinds() {
		sums[kind] = crc32.Update(crc32.Checksum([]byte(kind), table), table, zero)
	}
	return sums
}

// check refuses a file that is not a catalog, of another schema, or damaged.
func check(tx *bolt.Tx) error {
	meta := tx.Bucket(metaBucket)
	if meta == nil || !bytes.Equal(meta.Get(magicKey), magic) {
		return errors.New("it is a bbolt file, but not a catalog of kmsd")
	}
	if got := meta.Get(schemaKey); !bytes.Equal(got, schema) && !bytes.Equal(got, old) {
		return fmt.Errorf("%w: schema %q, this kmsd knows schema %q; use the kmsd that wrote it", catalog.ErrSchema, got, schema)
	}
	last := revision(tx)
	for _, kind := range catalog.Kinds() {
		b := tx.Bucket([]byte(kind))
		if b == nil {
			continue // of an older kmsd, which did not know it; raise makes it
		}
		err := b.ForEach(func(id, stored []byte) error {
			rev, _, err := parse(kind, id, stored)
			if err == nil && rev > last {
				err = fmt.Errorf("%s %q is at revision %d, the catalog at %d: %w", kind, id, rev, last, catalog.ErrDamaged)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// raise brings a file to the schema of this kmsd. An older kmsd knows nothing of data
// keys and would destroy versions that they need, so it must refuse the file from now on.
func raise(tx *bolt.Tx) error {
	meta := tx.Bucket(metaBucket)
	if bytes.Equal(meta.Get(schemaKey), schema) {
		return errNothing
	}
	if err := meta.Put(schemaKey, schema); err != nil {
		return fmt.Errorf("raising its schema: %w", err)
	}
	return addBuckets(tx)
}

// addBuckets makes the bucket of every kind that has none yet.
func addBuckets(tx *bolt.Tx) error {
	for _, kind := range catalog.Kinds() {
		if _, err := tx.CreateBucketIfNotExists([]byte(kind)); err != nil {
			return fmt.Errorf("adding the bucket %q: %w", kind, err)
		}
	}
	return nil
}

// createIfMissing makes an empty catalog. It is built under another name and then
// linked into place, and the folder is synced, so that after a power cut there is
// either no file or a whole one.
func createIfMissing(path string) (err error) {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, filepath.Base(path)+".new-*") // mode 0600
	if err != nil {
		return fmt.Errorf("creating it: %w", err)
	}
	defer func() {
		if rerr := os.Remove(f.Name()); err == nil {
			err = rerr
		}
	}()
	if err := f.Close(); err != nil {
		return fmt.Errorf("creating it: %w", err)
	}
	if err := initialise(f.Name()); err != nil {
		return fmt.Errorf("creating it: %w", err)
	}
	// Another process may have been faster: then its file is the catalog.
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("creating it: %w", err)
	}
	return syncDir(dir)
}

func initialise(path string) (err error) {
	db, err := bolt.Open(path, 0o600, options(nil))
	if err != nil {
		return err
	}
	defer func() {
		if cerr := db.Close(); err == nil {
			err = cerr
		}
	}()
	return db.Update(func(tx *bolt.Tx) error {
		meta, err := tx.CreateBucket(metaBucket)
		if err != nil {
			return err
		}
		if err := errors.Join(meta.Put(magicKey, magic), meta.Put(schemaKey, schema)); err != nil {
			return err
		}
		return addBuckets(tx)
	})
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
