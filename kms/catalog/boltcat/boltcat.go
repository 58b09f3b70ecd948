// Package boltcat answers: how does one process keep the catalog in one file?
//
// The file is a bbolt database with a bucket for each kind of record and a bucket
// "meta" that says what the file is. What Apply has answered is on the disk:
// changes that arrive together share one fsync.
//
// The file belongs to one process at a time. Another one gets an error that names
// the holder, whose process number stands in FILE.pid for that purpose only; the
// lock itself is flock on FILE and ends with the process, however it ends.
package boltcat

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"kmsd/kms/catalog"
)

// lockTimeout is how long Open waits for a process that is just ending.
const lockTimeout = 500 * time.Millisecond

// Store is a catalog.Store in one file.
type Store struct {
	path string
	db   *bolt.DB

	requests chan *request // to the writer, without a buffer: what is not taken has not begun
	closing  chan struct{} // closed by Close
	writer   sync.WaitGroup
	damaged  bool      // the writer's until it has ended: bbolt has panicked in a write
	once     sync.Once // guards the closing
	closeErr error
}

// Open opens the catalog at path and makes it when it does not exist. It reads
// every record once and refuses a file that is damaged, of an unknown form, or
// accessible to anybody but its owner. ErrInUse: another process has it open.
//
// A symbolic link is followed: whoever could put one there could put a file there.
func Open(path string) (_ *Store, err error) {
	defer wrap(&err, "opening catalog %s", path)
	if err := createIfMissing(path); err != nil {
		return nil, err
	}
	db, err := openFile(path)
	if err != nil {
		return nil, err
	}
	s := &Store{path: path, db: db, requests: make(chan *request), closing: make(chan struct{})}
	defer func() {
		if err != nil {
			_ = db.Close()
		}
	}()
	if err := s.view(check); err != nil {
		return nil, err
	}
	if err := s.write(raise); err != nil && !errors.Is(err, errNothing) {
		return nil, err
	}
	sayHolder(path)
	s.writer.Go(s.runWriter)
	return s, nil
}

// openFile opens and locks the file. It looks at the file that it has opened, not
// at the path, so that nobody can exchange one for the other in between.
func openFile(path string) (_ *bolt.DB, err error) {
	var file *os.File
	defer func() {
		// After a panic inside bbolt nobody else closes the file and with it the lock.
		if err != nil && file != nil {
			_ = file.Close()
		}
	}()
	defer guard(&err)
	defer faultsPanic()()
	open := func(path string, _ int, _ os.FileMode) (*os.File, error) {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		if err := checkMode(f); err != nil {
			_ = f.Close()
			return nil, err
		}
		file = f
		return f, nil
	}
	db, err := bolt.Open(path, 0o600, options(open))
	switch {
	case err == nil:
		if err := sameFile(file, path); err != nil {
			return nil, errors.Join(err, db.Close())
		}
		return db, nil
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("%w: %s has it; use that kmsd (kmsd ... --addr) or stop it", catalog.ErrInUse, holder(path))
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrVersionMismatch), errors.Is(err, berrors.ErrChecksum):
		return nil, fmt.Errorf("%w: bbolt says %q; restore it from a backup", catalog.ErrDamaged, err)
	default:
		return nil, err
	}
}

// sameFile makes sure that what was opened and locked is still what stands at path: a
// restore may have put another catalog there while this one waited for the lock.
func sameFile(f *os.File, path string) error {
	ours, err := f.Stat()
	if err != nil {
		return err
	}
	now, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !os.SameFile(ours, now) {
		return fmt.Errorf("%w: another catalog was put in its place just now; try again", catalog.ErrInUse)
	}
	return nil
}

func options(open func(string, int, os.FileMode) (*os.File, error)) *bolt.Options {
	return &bolt.Options{
		Timeout:      lockTimeout,
		FreelistType: bolt.FreelistMapType,
		NoStatistics: true,
		OpenFile:     open,
	}
}

func checkMode(f *os.File) error {
	info, err := f.Stat()
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return errors.New("it is not a regular file")
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("its mode is %04o; nobody but its owner may read or write it (chmod 600)", info.Mode().Perm())
	}
	return nil
}

// Get returns one record.
func (s *Store) Get(ctx context.Context, kind catalog.Kind, id string) (r catalog.Record, err error) {
	if err := errors.Join(catalog.CheckID(kind, id), ctx.Err()); err != nil {
		return catalog.Record{}, err
	}
	err = s.view(func(tx *bolt.Tx) error {
		stored := tx.Bucket([]byte(kind)).Get([]byte(id))
		if stored == nil {
			return catalog.ErrNotFound
		}
		r, err = decode(kind, []byte(id), stored)
		return err
	})
	return r, err
}

// List yields the records of a kind. It copies them first, because bbolt cannot
// grow the file under a reader, and the reader may write.
func (s *Store) List(ctx context.Context, kind catalog.Kind, prefix, after string, limit int) iter.Seq2[catalog.Record, error] {
	return func(yield func(catalog.Record, error) bool) {
		records, err := s.snapshot(ctx, kind, prefix, after, limit)
		if err != nil {
			yield(catalog.Record{}, err)
			return
		}
		for _, r := range records {
			if !yield(r, nil) {
				return
			}
		}
	}
}

func (s *Store) snapshot(ctx context.Context, kind catalog.Kind, prefix, after string, limit int) ([]catalog.Record, error) {
	var records []catalog.Record
	err := s.view(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte(kind))
		if b == nil {
			return fmt.Errorf("unknown kind of record %q", kind)
		}
		c := b.Cursor()
		from := []byte(max(prefix, after))
		for id, stored := c.Seek(from); id != nil && bytes.HasPrefix(id, []byte(prefix)); id, stored = c.Next() {
			if err := ctx.Err(); err != nil {
				return err
			}
			if string(id) == after {
				continue
			}
			if limit > 0 && len(records) == limit {
				break
			}
			r, err := decode(kind, id, stored)
			if err != nil {
				return err
			}
			records = append(records, r)
		}
		return ctx.Err()
	})
	return records, err
}

// Count counts the records of a kind.
func (s *Store) Count(ctx context.Context, kind catalog.Kind, prefix string) (n int, err error) {
	err = s.view(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte(kind))
		if b == nil {
			return fmt.Errorf("unknown kind of record %q", kind)
		}
		c := b.Cursor()
		for id, _ := c.Seek([]byte(prefix)); id != nil && bytes.HasPrefix(id, []byte(prefix)); id, _ = c.Next() {
			n++
			if n%1024 == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
		}
		return ctx.Err()
	})
	return n, err
}

// Rev returns the revision of the last Apply.
func (s *Store) Rev(ctx context.Context) (rev uint64, err error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	err = s.view(func(tx *bolt.Tx) error {
		rev = revision(tx)
		return nil
	})
	return rev, err
}

// Close waits for the changes that have begun and gives the file to others.
func (s *Store) Close() error {
	s.once.Do(func() {
		close(s.closing)
		s.writer.Wait()
		if s.damaged {
			// bbolt may hold its own lock for ever after a panic; the file is closed
			// and unlocked with the process.
			return
		}
		forgetHolder(s.path)
		if err := s.db.Close(); err != nil {
			s.closeErr = fmt.Errorf("closing catalog %s: %w", s.path, err)
		}
	})
	return s.closeErr
}

// view runs a read transaction.
func (s *Store) view(f func(*bolt.Tx) error) (err error) {
	defer guard(&err)
	defer faultsPanic()()
	return known(s.db.View(f))
}

// write runs a write transaction. When it returns nil the change is on the disk.
func (s *Store) write(f func(*bolt.Tx) error) (err error) {
	defer guard(&err)
	defer faultsPanic()()
	return known(s.db.Update(f))
}

func known(err error) error {
	if errors.Is(err, berrors.ErrDatabaseNotOpen) {
		return catalog.ErrClosed
	}
	return err
}

// guard turns a panic into ErrDamaged. bbolt panics where a page is not what it
// should be, and reading past the end of a file that was cut is a memory fault,
// which would end the process.
func guard(err *error) {
	if p := recover(); p != nil {
		text, _, _ := strings.Cut(fmt.Sprint(p), "\n")
		*err = fmt.Errorf("%w: %s; restore it from a backup", catalog.ErrDamaged, text)
	}
}

// wrap gives an error its context.
func wrap(err *error, format string, args ...any) {
	if *err != nil {
		*err = fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), *err)
	}
}

// faultsPanic makes memory faults of this goroutine panics until it is undone.
func faultsPanic() (undo func()) {
	old := debug.SetPanicOnFault(true)
	return func() { debug.SetPanicOnFault(old) }
}

func revision(tx *bolt.Tx) uint64 {
	b := tx.Bucket(metaBucket).Get(revKey)
	if len(b) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}
