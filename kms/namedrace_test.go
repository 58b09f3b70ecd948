package kms_test

import (
	"context"
	"iter"
	"sync"
	"testing"
	"testing/synctest"

	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// interrupted is a store in which something happens after a record of a kind was read, or
// the kind was listed, and before the reader gets it.
type interrupted struct {
	catalog.Store

	mu     sync.Mutex // guards what follows
	kind   catalog.Kind
	listed bool   // what it is that happens after
	do     func() // once; nil: nothing
}

func (s *interrupted) after(kind catalog.Kind, listed bool, do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kind, s.listed, s.do = kind, listed, do
}

func (s *interrupted) read(kind catalog.Kind, listed bool) {
	s.mu.Lock()
	var do func()
	if kind == s.kind && listed == s.listed {
		do, s.do = s.do, nil
	}
	s.mu.Unlock()
	if do != nil {
		do()
	}
}

func (s *interrupted) Get(ctx context.Context, kind catalog.Kind, id string) (catalog.Record, error) {
	r, err := s.Store.Get(ctx, kind, id)
	s.read(kind, false)
	return r, err
}

func (s *interrupted) List(ctx context.Context, kind catalog.Kind, prefix, after string, limit int) iter.Seq2[catalog.Record, error] {
	return func(yield func(catalog.Record, error) bool) {
		for r, err := range s.Store.List(ctx, kind, prefix, after, limit) {
			if !yield(r, err) {
				return
			}
		}
		s.read(kind, true)
	}
}

// Whoever has read the record just before a rekey moves it comes with an envelope under a
// version that is out of use: he must not be told that somebody has disabled his key.
func TestReadDuringARekeyThatRetiresTheOldVersion(t *testing.T) {
	retired := func(retire api.Retire) func(*rig) {
		return func(r *rig) { r.wantJob(r.rekey(api.RekeyOptions{Retire: retire}).ID, api.JobDone) }
	}
	destroyed := func(r *rig) {
		retired(api.RetireDisable)(r)
		if _, err := r.ChangeVersion(r.t.Context(), "shop", 1, api.VersionChange{Action: api.ActionDestroy}); err != nil {
			r.t.Error(err)
		}
	}
	for _, c := range []struct {
		name      string
		kind      catalog.Kind // whose record was read
		version   int
		meanwhile func(*rig)
		want      int
	}{
		{"the newest version, and the old one is disabled", catalog.KindDataKey, 0, retired(api.RetireDisable), 2},
		{"the newest version, and the old one is to be destroyed", catalog.KindDataKey, 0, retired(api.RetireDestroy), 2},
		{"the newest version, and the old one is destroyed", catalog.KindDataKey, 0, destroyed, 2},
		{"an older version", catalog.KindDataVersion, 1, retired(api.RetireDisable), 1},
		{"the newest version, which is not the newest any more", catalog.KindDataKey, 2, func(r *rig) {
			r.put("shop", "1")
			retired(api.RetireDisable)(r)
		}, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newDatabaseRig(t)
				store := &interrupted{Store: r.disk.Reopen()}
				r.mustStartOn(store)
				defer r.stop()
				if _, err := r.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{}); err != nil {
					t.Fatal(err)
				}
				r.put("shop", "1")
				r.put("shop", "1")
				store.after(c.kind, false, func() { c.meanwhile(r) })
				k, err := r.NamedKey(t.Context(), "shop", "1", c.version)
				if err != nil || k.Version != c.want || string(k.Plaintext) != string(secretOf("1", c.want)) {
					t.Errorf("read version %d, %q, %v; want version %d", k.Version, k.Plaintext, err, c.want)
				}
			})
		})
	}
}

// A key that somebody has disabled as a whole is refused, and not asked for again and again.
func TestReadOfADisabledDatabaseIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDatabaseRig(t).mustStart()
		defer r.stop()
		if _, err := r.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{}); err != nil {
			t.Fatal(err)
		}
		r.put("shop", "1")
		if _, err := r.Disable(t.Context(), "shop"); err != nil {
			t.Fatal(err)
		}
		_, err := r.NamedKey(t.Context(), "shop", "1", 0)
		wantError(t, err, kms.ErrState, "version 1 of key shop is disabled")
	})
}
