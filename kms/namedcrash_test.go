package kms_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
)

// dataStory is what the administrator of a database does, and what he was told has worked.
// He goes on after a failure.
type dataStory struct {
	*rig
	made     map[string][]string // :: ID → plaintexts of its acknowledged versions, in their order
	deleted  map[string]int      // :: ID → acknowledged version whose deletion was tried
	failures []error
}

func (s *dataStory) tell() {
	s.made, s.deleted = make(map[string][]string), make(map[string]int)
	_, err := s.CreateDatabase(s.t.Context(), "shop", api.DatabaseOptions{})
	s.note(err)
	s.put("1", "red 1")
	s.put("2", "blue 1")
	s.put("1", "red 2")
	_, err = s.Rotate(s.t.Context(), "shop")
	s.note(err)
	s.put("2", "blue 2")
	s.put("1", "red 3")
	s.deleted["2"] = len(s.made["2"])
	s.note(s.DeleteNamedKey(s.t.Context(), "shop", "2"))
	s.put("2", "blue 3")
}

func (s *dataStory) put(id, plaintext string) {
	k, err := s.PutNamedKey(s.t.Context(), "shop", id, api.NamedKeyPut{Plaintext: []byte(plaintext)})
	s.note(err)
	if err == nil {
		if s.made[id] = append(s.made[id], plaintext); k.Version != len(s.made[id]) {
			s.t.Errorf("%s was made as version %d", plaintext, k.Version)
		}
	}
}

func (s *dataStory) note(err error) {
	if err != nil {
		s.failures = append(s.failures, err)
	}
}

// check opens the service anew and looks whether it kept its word.
func (s *dataStory) check() {
	s.t.Helper()
	s.wantStates(api.MemberActive, api.MemberActive)
	s.wantConsistent()
	if _, err := s.CreateDatabase(s.t.Context(), "shop", api.DatabaseOptions{}); err != nil && !errors.Is(err, kms.ErrExists) {
		s.t.Fatalf("making the database again: %v", err)
	}
	if key, err := s.Key(s.t.Context(), "shop"); err != nil || !slices.Equal(key.Databases, []string{"shop"}) {
		s.t.Errorf("the master key is %+v, %v", key, err)
	}
	versions := 0
	for _, id := range []string{"1", "2"} {
		versions += s.checkKey(id)
	}
	if db, err := s.Database(s.t.Context(), "shop"); err != nil || db.Versions != versions {
		s.t.Errorf("the database is %+v, %v; want %d versions", db, err, versions)
	}
}

// checkKey reads all versions: those that were acknowledged, and at most one that was not.
func (s *dataStory) checkKey(id string) (versions int) {
	s.t.Helper()
	newest, err := s.DescribeNamedKey(s.t.Context(), "shop", id)
	if err != nil && (!errors.Is(err, kms.ErrNotFound) || len(s.made[id]) > 0) {
		s.t.Fatalf("describing data key %s: %v", id, err)
	}
	if extra := newest.Version - len(s.made[id]); extra < 0 || extra > 1 {
		s.t.Errorf("data key %s has %d versions, %d were acknowledged", id, newest.Version, len(s.made[id]))
	}
	for v := 1; v <= newest.Version; v++ {
		k, err := s.NamedKey(s.t.Context(), "shop", id, v)
		switch {
		case errors.Is(err, api.ErrDeleted) && v >= s.deleted[id]:
		case err != nil:
			s.t.Errorf("reading version %d of data key %s: %v", v, id, err)
		case v <= len(s.made[id]) && string(k.Plaintext) != s.made[id][v-1]:
			s.t.Errorf("version %d of data key %s is %q, want %q", v, id, k.Plaintext, s.made[id][v-1])
		}
	}
	return newest.Version
}

func TestCrashAtEveryStepOfDataKeys(t *testing.T) {
	for step, more := 1, true; more; step++ {
		t.Run(fmt.Sprintf("step %d", step), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &dataStory{rig: newDatabaseRig(t)}
				store := catalogtest.NewCrasher(s.disk.Reopen(), step)
				if err := s.start(store); err == nil {
					s.tell()
					s.stop()
				}
				if more = store.Crashed(); !more && s.failures != nil {
					t.Fatalf("without a crash: %v", errors.Join(s.failures...))
				}
				s.mustStart()
				defer s.stop()
				s.check()
			})
		})
	}
}

// faulty is a store that does something else once, when a record of a kind is written.
type faulty struct {
	catalog.Store
	kind catalog.Kind

	mu    sync.Mutex // guards what follows
	next  func(ctx context.Context, changes ...catalog.Record) (uint64, error)
	blind bool // nothing can be read
}

func (f *faulty) then(do func(ctx context.Context, changes ...catalog.Record) (uint64, error)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next = do
}

func (f *faulty) setBlind(blind bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.blind = blind
}

func (f *faulty) Apply(ctx context.Context, changes ...catalog.Record) (uint64, error) {
	apply := f.Store.Apply
	if slices.ContainsFunc(changes, func(r catalog.Record) bool { return r.Kind == f.kind }) {
		f.mu.Lock()
		if f.next != nil {
			apply, f.next = f.next, nil
		}
		f.mu.Unlock()
	}
	return apply(ctx, changes...)
}

func (f *faulty) Get(ctx context.Context, kind catalog.Kind, id string) (catalog.Record, error) {
	f.mu.Lock()
	blind := f.blind
	f.mu.Unlock()
	if blind {
		return catalog.Record{}, errDisk
	}
	return f.Store.Get(ctx, kind, id)
}

var errDisk = errors.New("input/output error")

func TestHowAWriteEndedIsFoundOut(t *testing.T) {
	createBank := func(r *rig) (int, error) {
		db, err := r.CreateDatabase(r.t.Context(), "bank", api.DatabaseOptions{})
		return db.Version, err
	}
	put := func(r *rig) (int, error) {
		k, err := r.PutNamedKey(r.t.Context(), "shop", "1", api.NamedKeyPut{})
		return k.Version, err
	}
	remove := func(r *rig) (int, error) { return 0, r.DeleteNamedKey(r.t.Context(), "shop", "1") }
	rekey := func(r *rig) (int, error) {
		job, err := r.Rekey(r.t.Context(), "shop", api.RekeyOptions{})
		return job.Version, err
	}
	newest := func(r *rig) string {
		k, err := r.DescribeNamedKey(r.t.Context(), "shop", "1")
		return fmt.Sprint(k.Version, " ", k.Deleted != nil, " ", err)
	}
	bank := func(r *rig) string {
		key, err := r.Key(r.t.Context(), "bank")
		_, absent := r.Database(r.t.Context(), "bank")
		return fmt.Sprint(key.Databases, err, " ", errors.Is(absent, kms.ErrNotFound))
	}
	job := func(r *rig) string {
		db, err := r.Database(r.t.Context(), "shop")
		return fmt.Sprint(db.Version, " ", db.Job != "", " ", err)
	}
	for _, c := range []struct {
		name    string
		kind    catalog.Kind
		written bool  // before the error
		fault   error // nil: as errDisk, and nothing can be read after it
		do      func(*rig) (int, error)
		version int
		want    error
		text    string
		then    func(*rig) string
		state   string
	}{
		{"a version was written", catalog.KindDataKey, true, errDisk, put, 2, nil, "", newest, "2 false <nil>"},
		{"a version was not written", catalog.KindDataKey, false, errDisk, put, 0, kms.ErrInternal, "input/output error", newest, "1 false <nil>"},
		{"there was no room for a version", catalog.KindDataKey, false, catalog.ErrFull, put, 0, kms.ErrUnavailable, "no room left", newest, "1 false <nil>"},
		{"nobody knows about a version", catalog.KindDataKey, true, nil, put, 0, kms.ErrUnavailable, `it is not known whether version 2 of data key "1" of database "shop" was made`, newest, "2 false <nil>"},
		{"a mark was written", catalog.KindDataKey, true, errDisk, remove, 0, nil, "", newest, "1 true <nil>"},
		{"a mark was not written", catalog.KindDataKey, false, errDisk, remove, 0, kms.ErrInternal, "input/output error", newest, "1 false <nil>"},
		{"a database was written", catalog.KindDatabase, true, errDisk, createBank, 1, nil, "", bank, "[bank] <nil> false"},
		{"a job was written", catalog.KindJob, true, errDisk, rekey, 2, nil, "", job, "2 true <nil>"},
		{"a job was not written", catalog.KindJob, false, errDisk, rekey, 0, kms.ErrInternal, "input/output error", job, "2 false <nil>"},
		{"a database was not written", catalog.KindDatabase, false, errDisk, createBank, 0, kms.ErrInternal, "input/output error", bank, "[] <nil> true"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newDatabaseRig(t)
				store := &faulty{Store: r.disk.Reopen(), kind: c.kind}
				r.mustStartOn(store)
				defer r.stop()
				if _, err := r.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{}); err != nil {
					t.Fatal(err)
				}
				if _, err := put(r); err != nil {
					t.Fatal(err)
				}
				store.then(func(ctx context.Context, changes ...catalog.Record) (uint64, error) {
					if c.written {
						if _, err := store.Store.Apply(ctx, changes...); err != nil {
							t.Error(err)
						}
					}
					store.setBlind(c.fault == nil)
					return 0, cmp.Or(c.fault, errDisk)
				})
				version, err := c.do(r)
				if c.want != nil {
					wantError(t, err, c.want, c.text)
				} else if err != nil || version != c.version {
					t.Errorf("version %d, %v; want version %d", version, err, c.version)
				}
				store.setBlind(false)
				if got := c.then(r); got != c.state {
					t.Errorf("then it is %q, want %q", got, c.state)
				}
			})
		})
	}
}

// A version that another one follows before its own write is known to have ended is the
// older one by then.
func TestVersionIsFoundBehindTheOneAfterIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDatabaseRig(t)
		store := &faulty{Store: r.disk.Reopen(), kind: catalog.KindDataKey}
		r.mustStartOn(store)
		defer r.stop()
		if _, err := r.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{}); err != nil {
			t.Fatal(err)
		}
		store.then(func(ctx context.Context, changes ...catalog.Record) (uint64, error) {
			if _, err := store.Store.Apply(ctx, changes...); err != nil {
				t.Error(err)
			}
			if k, err := r.PutNamedKey(ctx, "shop", "1", api.NamedKeyPut{Plaintext: []byte("second")}); err != nil || k.Version != 2 {
				t.Errorf("%+v, %v", k, err)
			}
			return 0, errDisk
		})
		if k, err := r.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{Plaintext: []byte("first")}); err != nil || k.Version != 1 {
			t.Errorf("%+v, %v", k, err)
		}
		for v, want := range []string{"second", "first", "second"} {
			if k, err := r.NamedKey(t.Context(), "shop", "1", v); err != nil || string(k.Plaintext) != want {
				t.Errorf("version %d is %q, %v", v, k.Plaintext, err)
			}
		}
	})
}
