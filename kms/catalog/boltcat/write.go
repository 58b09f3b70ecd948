package boltcat

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	bolt "go.etcd.io/bbolt"

	"kmsd/kms/catalog"
)

// Limits of one transaction. Whoever comes later shares the next fsync.
const (
	maxTogether      = 256     // requests
	maxTogetherBytes = 8 << 20 // bytes of their values
)

// request is one Apply on its way through the writer.
type request struct {
	changes []catalog.Record
	done    chan struct{} // closed when rev and err are set
	rev     uint64
	err     error
}

func (r *request) size() int {
	n := 0
	for _, c := range r.changes {
		n += len(c.Value)
	}
	return n
}

// Apply writes all of the changes or none. It looks at ctx until writing begins
// and then waits for the disk, so that a context's error means that nothing was
// changed.
func (s *Store) Apply(ctx context.Context, changes ...catalog.Record) (uint64, error) {
	if err := catalog.CheckChanges(changes); err != nil {
		return 0, err
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	r := &request{changes: changes, done: make(chan struct{})}
	select {
	case s.requests <- r:
		<-r.done
		return r.rev, r.err
	case <-s.closing:
		return 0, catalog.ErrClosed
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// runWriter is the only goroutine that writes, until Close. All requests that wait
// while one transaction is written go into the next one together.
func (s *Store) runWriter() {
	var broken error // set once the disk has failed: what it holds is not certain any more
	for {
		select {
		case <-s.closing:
			return
		case first := <-s.requests:
			batch := s.collect(first)
			err := broken
			if err == nil {
				err = s.commit(batch)
				if err != nil && !outOfSpace(err) {
					s.damaged = errors.Is(err, catalog.ErrDamaged)
					broken = fmt.Errorf("the catalog takes no changes until kmsd is started anew, because writing failed: %w", err)
				}
			}
			for _, r := range batch {
				if err != nil && r.err == nil {
					r.rev, r.err = 0, fmt.Errorf("writing catalog %s: %w", s.path, named(err))
				}
				close(r.done)
			}
		}
	}
}

func (s *Store) collect(first *request) []*request {
	batch, size := []*request{first}, first.size()
	for len(batch) < maxTogether && size < maxTogetherBytes {
		select {
		case r := <-s.requests:
			batch, size = append(batch, r), size+r.size()
		default:
			return batch
		}
	}
	return batch
}

// errNothing rolls back a transaction in which nobody changes anything.
var errNothing = errors.New("nothing to write")

// commit writes a batch in one transaction. A request that cannot be done gets its
// own error and leaves no trace; the error of commit is everybody's.
func (s *Store) commit(batch []*request) error {
	err := s.write(func(tx *bolt.Tx) error {
		before := revision(tx)
		rev := before
		for _, r := range batch {
			if r.err = conflict(tx, r.changes); r.err != nil {
				continue
			}
			rev++
			if err := apply(tx, rev, r.changes); err != nil {
				return err
			}
			r.rev = rev
		}
		if rev == before {
			return errNothing
		}
		return tx.Bucket(metaBucket).Put(revKey, binary.BigEndian.AppendUint64(nil, rev))
	})
	if errors.Is(err, errNothing) {
		return nil
	}
	return err
}

// conflict compares the revisions of all changes before any of them is made.
func conflict(tx *bolt.Tx, changes []catalog.Record) error {
	for _, c := range changes {
		has := uint64(0)
		if stored := tx.Bucket([]byte(c.Kind)).Get([]byte(c.ID)); stored != nil {
			var err error
			if has, _, err = parse(c.Kind, []byte(c.ID), stored); err != nil {
				return err
			}
		}
		if has != c.Rev {
			return fmt.Errorf("%s %q is at revision %d, not %d: %w", c.Kind, c.ID, has, c.Rev, catalog.ErrConflict)
		}
	}
	return nil
}

func apply(tx *bolt.Tx, rev uint64, changes []catalog.Record) error {
	for _, c := range changes {
		b := tx.Bucket([]byte(c.Kind))
		var err error
		switch {
		case c.Keep:
		case c.Value == nil:
			err = b.Delete([]byte(c.ID))
		default:
			c.Rev = rev
			err = b.Put([]byte(c.ID), encode(c))
		}
		if err != nil {
			return fmt.Errorf("%s %q: %w", c.Kind, c.ID, err)
		}
	}
	return nil
}

// named gives a failure its name, if callers know one.
func named(err error) error {
	if outOfSpace(err) {
		return fmt.Errorf("%w: %w", catalog.ErrFull, err)
	}
	return err
}

// outOfSpace tells the one failure of a disk after which trying again is sound:
// bbolt writes all pages before it makes them count.
func outOfSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
