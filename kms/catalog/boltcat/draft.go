package boltcat

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"kmsd/kms/catalog"
)

// Draft is a catalog that is built beside its place, without waiting for the disk at
// every change, and put there in one step: after a crash at any moment there is the
// whole of it or none.
type Draft struct {
	*Store
	path string
	old  *Store // an empty catalog that is in its place, held so that nobody uses it; nil: none
}

// NewDraft begins a catalog for path. One that is there already must be empty and in
// nobody's use: ErrInUse, ErrNotEmpty.
func NewDraft(path string) (_ *Draft, err error) {
	defer wrap(&err, "preparing catalog %s", path)
	old, err := openEmpty(path)
	if err != nil {
		return nil, err
	}
	d := &Draft{path: path, old: old}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Discard())
		}
	}()
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".draft-*") // mode 0600
	if err != nil {
		return nil, err
	}
	name := f.Name()
	if err := errors.Join(f.Close(), initialise(name)); err != nil {
		return nil, errors.Join(err, os.Remove(name))
	}
	if d.Store, err = Open(name); err != nil {
		return nil, errors.Join(err, os.Remove(name))
	}
	d.db.NoSync = true
	return d, nil
}

// ErrNotEmpty: there is a catalog already, with records in it.
var ErrNotEmpty = errors.New("there is a catalog already, which is not empty; it is not overwritten: move it away, or give another path")

// openEmpty opens the catalog that is at path, nil when there is none.
func openEmpty(path string) (*Store, error) {
	if _, err := os.Stat(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	s, err := Open(path)
	if err != nil {
		return nil, err
	}
	for _, kind := range catalog.Kinds() {
		n, err := s.Count(context.Background(), kind, "")
		if err == nil && n > 0 {
			err = ErrNotEmpty
		}
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	return s, nil
}

// Commit puts the catalog in its place and closes it. After an error the place is as it
// was, but when only the folder could not be written to the disk.
func (d *Draft) Commit() (err error) {
	defer wrap(&err, "putting catalog %s in its place", d.path)
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Discard())
		}
	}()
	name := d.Store.path
	if err := errors.Join(d.db.Sync(), d.Store.Close()); err != nil {
		return err
	}
	place := os.Link // which takes no place that somebody has taken meanwhile
	if d.old != nil {
		place = os.Rename
	}
	if err := place(name, d.path); err != nil {
		return err
	}
	if d.old == nil {
		err = os.Remove(name)
	}
	d.Store = nil
	return errors.Join(err, syncDir(filepath.Dir(d.path)), d.release())
}

// Discard gives the draft up. After Commit it does nothing.
func (d *Draft) Discard() error {
	var err error
	if d.Store != nil {
		err = errors.Join(d.Store.Close(), os.Remove(d.Store.path))
		d.Store = nil
	}
	return errors.Join(err, d.release())
}

func (d *Draft) release() error {
	if d.old == nil {
		return nil
	}
	err := d.old.Close()
	d.old = nil
	if err != nil {
		return fmt.Errorf("closing the empty catalog: %w", err)
	}
	return nil
}
