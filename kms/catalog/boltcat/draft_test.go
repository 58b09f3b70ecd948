package boltcat_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"kmsd/kms/catalog"
	"kmsd/kms/catalog/boltcat"
)

func TestDraftIsThereWholeOrNotAtAll(t *testing.T) {
	for _, c := range []struct {
		name  string
		empty bool // there is an empty catalog before
		end   func(*boltcat.Draft) error
		want  bool
	}{
		{"committed", false, (*boltcat.Draft).Commit, true},
		{"committed in place of an empty one", true, (*boltcat.Draft).Commit, true},
		{"discarded", false, (*boltcat.Draft).Discard, false},
		{"discarded beside an empty one", true, (*boltcat.Draft).Discard, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "catalog.db")
			if c.empty {
				mustOpen(t, path).Close()
			}
			d, err := boltcat.NewDraft(path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := d.Apply(t.Context(), record("a", "value")); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(path); err == nil != c.empty {
				t.Errorf("before the end: %v", err)
			}
			if err := c.end(d); err != nil {
				t.Fatal(err)
			}
			if err := d.Discard(); err != nil {
				t.Errorf("discarding what has ended: %v", err)
			}
			entries, _ := os.ReadDir(filepath.Dir(path))
			if want := c.want || c.empty; want != (len(entries) == 1) {
				t.Errorf("left behind: %v", entries)
			}
			s := mustOpen(t, path)
			defer s.Close()
			if _, err := s.Get(t.Context(), catalog.KindKey, "a"); (err == nil) != c.want {
				t.Errorf("reading what was written: %v", err)
			}
		})
	}
}

func TestDraftTakesNobodysPlace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "catalog.db")
	s := mustOpen(t, path)
	if _, err := boltcat.NewDraft(path); !errors.Is(err, catalog.ErrInUse) {
		t.Errorf("of a catalog in use: %v", err)
	}
	if _, err := s.Apply(t.Context(), record("a", "value")); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := boltcat.NewDraft(path); !errors.Is(err, boltcat.ErrNotEmpty) {
		t.Errorf("of a catalog with records: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	d, err := boltcat.NewDraft(path)
	if err != nil {
		t.Fatal(err)
	}
	mustOpen(t, path).Close() // somebody is faster
	if err := d.Commit(); !errors.Is(err, os.ErrExist) {
		t.Errorf("committed over another: %v", err)
	}
	entries, _ := os.ReadDir(filepath.Dir(path))
	if len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}
