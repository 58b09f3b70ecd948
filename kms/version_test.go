package kms_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
)

// change changes the state of a version; window is for a destruction.
func (r *rig) change(name string, version int, action api.VersionAction, window time.Duration) (kms.Key, error) {
	return r.ChangeVersion(r.t.Context(), name, version, api.VersionChange{Action: action, Window: window})
}

func (r *rig) wantVersions(name string, want ...kms.State) {
	r.t.Helper()
	key, err := r.Key(r.t.Context(), name)
	if err != nil {
		r.t.Fatal(err)
	}
	var got []kms.State
	for _, v := range key.Versions {
		got = append(got, v.State)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		r.t.Fatalf("the versions of key %s are %v, want %v", name, got, want)
	}
}

// withDatabase begins a rig whose key shop has the database orders.
func withDatabase(t *testing.T) *rig {
	t.Helper()
	r := newRig(t, 1).mustStart()
	r.create("shop")
	r.stop()
	c := catalog.New(r.disk.Reopen())
	key := must(c.Key(t.Context(), "shop"))
	key.Databases = []string{"orders"}
	if _, _, err := c.CreateDatabase(t.Context(), catalog.Database{Name: "orders", Key: "shop", Created: key.Created}, key); err != nil {
		t.Fatal(err)
	}
	return r
}

// putDataKey writes the first or the next version of a data key of orders, wrapped under
// the newest version of shop.
func putDataKey(ctx context.Context, disk *catalogtest.Memory, id string) error {
	c := catalog.New(disk.Reopen())
	master, err := c.Key(ctx, "shop")
	if err != nil {
		return err
	}
	dk, err := c.DataKey(ctx, "orders", id)
	var old *catalog.OldVersion
	switch {
	case err == nil:
		old = &catalog.OldVersion{Database: "orders", ID: id, DataVersion: dk.DataVersion}
	case !errors.Is(err, catalog.ErrNotFound):
		return err
	}
	dk.Database, dk.ID, dk.Number, dk.Master, dk.Envelope = "orders", id, dk.Number+1, master.Newest(), []byte("envelope")
	_, err = c.PutDataKey(ctx, master, dk, old)
	return err
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestOneVersionHasALifeOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		first := r.wrap("shop")
		must(r.Rotate(t.Context(), "shop"))
		second := r.wrap("shop")

		must(r.change("shop", 1, api.ActionDisable, 0))
		must(r.change("shop", 1, api.ActionDisable, 0)) // again is no error
		r.wantVersions("shop", kms.StateDisabled, kms.StateEnabled)
		_, err := r.Unwrap(t.Context(), "shop", first, []byte("aad"))
		wantError(t, err, kms.ErrState, "version 1 of key shop is disabled")
		r.wantUnwrap("shop", second)
		must(r.change("shop", 1, api.ActionEnable, 0))
		r.wantUnwrap("shop", first)

		must(r.change("shop", 2, api.ActionDisable, 0))
		if key := must(r.Key(t.Context(), "shop")); key.Primary != 1 || key.State != kms.StateEnabled {
			t.Errorf("without version 2 the primary is %d of a key that is %s", key.Primary, key.State)
		}
		must(r.change("shop", 2, api.ActionEnable, 0))

		must(r.change("shop", 1, api.ActionDisable, 0))
		must(r.change("shop", 1, api.ActionDestroy, time.Hour))
		r.wantVersions("shop", kms.StateDestroyScheduled, kms.StateEnabled)
		_, err = r.change("shop", 1, api.ActionEnable, 0)
		wantError(t, err, kms.ErrState, "version 1 of key shop is scheduled for destruction")
		_, err = r.change("shop", 1, api.ActionDisable, 0)
		wantError(t, err, kms.ErrState, "version 1 of key shop is scheduled for destruction")
		must(r.change("shop", 1, api.ActionRestore, 0))
		r.wantVersions("shop", kms.StateDisabled, kms.StateEnabled)
		_, err = r.change("shop", 1, api.ActionRestore, 0)
		wantError(t, err, kms.ErrState, "version 1 of key shop is disabled, not scheduled for destruction")

		must(r.change("shop", 1, api.ActionDestroy, 3*time.Minute))
		<-time.After(4 * time.Minute)
		r.wantVersions("shop", kms.StateDestroyed, kms.StateEnabled)
		must(r.change("shop", 2, api.ActionDestroy, 0))
		r.wantVersions("shop", kms.StateDestroyed, kms.StateDestroyed)
		for _, action := range []api.VersionAction{api.ActionEnable, api.ActionDisable, api.ActionDestroy, api.ActionRestore} {
			_, err = r.change("shop", 2, action, 0)
			wantError(t, err, kms.ErrState, "version 2 of key shop is destroyed")
			_, err = r.change("shop", 3, action, 0)
			wantError(t, err, kms.ErrNotFound, "key shop has no version 3")
			_, err = r.change("till", 1, action, 0)
			wantError(t, err, kms.ErrNotFound, `no key "till"`)
		}
		_, err = r.change("shop", 2, "erase", 0)
		wantError(t, err, kms.ErrBadRequest, `no action "erase"`)
		r.wantConsistent()
	})
}

func TestAVersionThatADataKeyNeedsStaysEnabled(t *testing.T) {
	whole := func(window time.Duration) func(*rig) error {
		return func(r *rig) error { _, err := r.Destroy(r.t.Context(), "shop", window); return err }
	}
	one := func(version int, action api.VersionAction, window time.Duration) func(*rig) error {
		return func(r *rig) error { _, err := r.change("shop", version, action, window); return err }
	}
	for _, tc := range []struct {
		name string
		do   func(*rig) error
		says string
	}{
		{"disabling the newest", one(2, api.ActionDisable, 0), `version 2 of key shop wraps version 2 of data key "new" of database orders`},
		{"destroying the newest later", one(2, api.ActionDestroy, time.Hour), `version 2 of key shop wraps version 2 of data key "new"`},
		{"destroying the newest now", one(2, api.ActionDestroy, 0), `version 2 of key shop wraps version 2 of data key "new"`},
		{"disabling one that an older version of a data key has", one(1, api.ActionDisable, 0), `version 1 of key shop wraps version 1 of data key "new"`},
		{"destroying one that an older version has", one(1, api.ActionDestroy, 0), `version 1 of key shop wraps version 1 of data key "new"`},
		{"destroying the key later", whole(time.Hour), "of key shop wraps version 2 of data key"},
		{"destroying the key now", whole(0), "of key shop wraps version 2 of data key"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := withDatabase(t).mustStart()
				defer r.stop()
				mustPut(t, r, "new")
				must(r.Rotate(t.Context(), "shop"))
				mustPut(t, r, "new")
				err := tc.do(r)
				wantError(t, err, kms.ErrState, tc.says)
				if hint := api.AsError(err).Hint; !strings.Contains(hint, "rekey database orders") {
					t.Errorf("the hint is %q", hint)
				}
				r.wantVersions("shop", kms.StateEnabled, kms.StateEnabled)
				if _, err := r.Disable(t.Context(), "shop"); err != nil {
					t.Errorf("disabling the key as a whole: %v", err)
				}
			})
		})
	}
}

func mustPut(t *testing.T, r *rig, id string) {
	t.Helper()
	if err := putDataKey(t.Context(), r.disk, id); err != nil {
		t.Fatal(err)
	}
}

func TestVersionsThatNoDataKeyNeedsMayGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := withDatabase(t).mustStart()
		defer r.stop()
		must(r.Rotate(t.Context(), "shop"))
		must(r.Rotate(t.Context(), "shop"))
		mustPut(t, r, "a")
		must(r.change("shop", 1, api.ActionDestroy, 0))
		must(r.change("shop", 2, api.ActionDisable, 0))
		r.wantVersions("shop", kms.StateDestroyed, kms.StateDisabled, kms.StateEnabled)
		must(r.change("shop", 2, api.ActionDestroy, time.Minute))
		<-time.After(2 * time.Minute)
		r.wantVersions("shop", kms.StateDestroyed, kms.StateDestroyed, kms.StateEnabled)
	})
}

func TestAKeyWhoseDatabasesAreEmptyCanBeDestroyed(t *testing.T) {
	for name, window := range map[string]time.Duration{"now": 0, "in a minute": time.Minute} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := withDatabase(t).mustStart()
				defer r.stop()
				must(r.Destroy(t.Context(), "shop", window))
				<-time.After(2 * time.Minute)
				r.wantVersions("shop", kms.StateDestroyed)
				if err := putDataKey(t.Context(), r.disk, "late"); err == nil {
					t.Error("a data key was written under a destroyed key")
				}
			})
		})
	}
}

// hookStore calls before with every change, before it is made.
type hookStore struct {
	catalog.Store
	before func([]catalog.Record)
}

func (s *hookStore) Apply(ctx context.Context, changes ...catalog.Record) (uint64, error) {
	s.before(changes)
	return s.Store.Apply(ctx, changes...)
}

// putBefore is a store in which a data key is written in the last moment before the first
// change of a key.
func (r *rig) putBefore(below catalog.Store) catalog.Store {
	put := sync.OnceFunc(func() {
		if err := putDataKey(r.t.Context(), r.disk, "late"); err != nil {
			r.t.Error(err)
		}
	})
	return &hookStore{Store: below, before: func(changes []catalog.Record) {
		if changes[0].Kind == catalog.KindKey {
			put()
		}
	}}
}

// retirements are all ways to take the newest version out of use.
var retirements = map[string]func(*rig) error{
	"disabling it": func(r *rig) error { _, err := r.change("shop", 1, api.ActionDisable, 0); return err },
	"destroying it later": func(r *rig) error {
		_, err := r.change("shop", 1, api.ActionDestroy, time.Minute)
		return err
	},
	"destroying it now": func(r *rig) error { _, err := r.change("shop", 1, api.ActionDestroy, 0); return err },
	"destroying the key later": func(r *rig) error {
		_, err := r.Destroy(r.t.Context(), "shop", time.Minute)
		return err
	},
	"destroying the key now": func(r *rig) error { _, err := r.Destroy(r.t.Context(), "shop", 0); return err },
}

func TestADataKeyThatComesInTheLastMomentKeepsItsVersion(t *testing.T) {
	for name, do := range retirements {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := withDatabase(t)
				if err := r.start(r.putBefore(r.disk.Reopen())); err != nil {
					t.Fatal(err)
				}
				defer r.stop()
				wantError(t, do(r), kms.ErrState, `version 1 of key shop wraps version 1 of data key "late"`)
				r.wantVersions("shop", kms.StateEnabled)
				<-time.After(2 * time.Minute)
				r.wantVersions("shop", kms.StateEnabled)
			})
		})
	}
}

// Whatever a crash leaves, the version is there and can be brought back.
func TestACrashNeverDestroysAVersionThatADataKeyNeeds(t *testing.T) {
	for name, do := range retirements {
		for step, more := 1, true; more; step++ {
			t.Run(fmt.Sprintf("%s, step %d", name, step), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := withDatabase(t)
					crasher := catalogtest.NewCrasher(r.disk.Reopen(), step)
					if err := r.start(r.putBefore(crasher)); err == nil {
						if err := do(r); err == nil {
							t.Error("it is done, though a data key needs the version")
						}
						r.stop()
					}
					more = crasher.Crashed()

					r.mustStart()
					defer r.stop()
					<-time.After(3 * time.Minute)
					switch key := must(r.Key(t.Context(), "shop")); key.Versions[0].State {
					case kms.StateEnabled:
					case kms.StateDisabled:
						must(r.change("shop", 1, api.ActionEnable, 0))
					case kms.StateDestroyScheduled: // to be destroyed now, which a crash makes later
						must(r.change("shop", 1, api.ActionRestore, 0))
					default:
						t.Fatalf("after the crash the version is %s", key.Versions[0].State)
					}
					r.wantUnwrap("shop", r.wrap("shop"))
				})
			})
		}
	}
}

func TestTheJanitorBringsBackWhatADataKeyNeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := withDatabase(t)
		mustPut(t, r, "a")
		must(catalog.New(r.disk.Reopen()).UpdateKey(t.Context(), "shop", func(k *catalog.Key) error {
			at := time.Now().Add(time.Minute)
			k.Versions[0].State, k.Versions[0].Before, k.Versions[0].DestroyAt = catalog.DestroyScheduled, catalog.Enabled, &at
			return nil
		}))
		r.mustStart()
		defer r.stop()
		r.wantVersions("shop", kms.StateDestroyScheduled)
		<-time.After(2 * time.Minute)
		r.wantVersions("shop", kms.StateEnabled)
		r.wantUnwrap("shop", r.wrap("shop"))
		if log := r.log.String(); !strings.Contains(log, "kept a version that was to be destroyed now") || !strings.Contains(log, "database orders") {
			t.Errorf("the log says nothing of it: %s", log)
		}
	})
}

func TestPutsAndRetirementsAtTheSameTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := withDatabase(t).mustStart()
		defer r.stop()
		ctx := t.Context()
		for round := range 40 {
			must(r.Rotate(ctx, "shop"))
			newest := round + 2
			var wg sync.WaitGroup
			for put := range 3 {
				wg.Go(func() {
					err := putDataKey(ctx, r.disk, fmt.Sprint(put))
					if err != nil && !errors.Is(err, catalog.ErrConflict) && !strings.Contains(err.Error(), "newest enabled version") {
						t.Error(err)
					}
				})
			}
			var retired error
			wg.Go(func() {
				action := []api.VersionAction{api.ActionDisable, api.ActionDestroy}[round%2]
				_, retired = r.change("shop", newest, action, 0)
			})
			wg.Wait()
			wantNobodyLost(t, r, newest, retired)
		}
	})
}

// wantNobodyLost checks that a version was either refused to go and is enabled, or has
// gone and no data key needs it.
func wantNobodyLost(t *testing.T, r *rig, version int, retired error) {
	t.Helper()
	if retired != nil && !errors.Is(retired, kms.ErrState) {
		t.Fatal(retired)
	}
	key := must(r.Key(t.Context(), "shop"))
	if enabled := key.Versions[version-1].State == kms.StateEnabled; enabled != (retired != nil) {
		t.Fatalf("version %d is %s, though the answer was %v", version, key.Versions[version-1].State, retired)
	}
	c := catalog.New(r.disk.Reopen())
	for dk, err := range c.DataKeys(t.Context(), "orders", "", "", 0) {
		if err != nil || key.Versions[dk.Master-1].State != kms.StateEnabled {
			t.Fatalf("data key %s needs version %d, which is %s; %v", dk.ID, dk.Master, key.Versions[dk.Master-1].State, err)
		}
	}
	for old, err := range c.OldVersions(t.Context(), "orders", catalog.OldVersion{}, 0) {
		if err != nil || key.Versions[old.Master-1].State != kms.StateEnabled {
			t.Fatalf("version %d of data key %s needs version %d, which is %s; %v", old.Number, old.ID, old.Master, key.Versions[old.Master-1].State, err)
		}
	}
}
