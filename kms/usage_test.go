package kms_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
)

// startWithLimits opens the service so that versions are spent sooner than is safe.
func (r *rig) startWithLimits(store catalog.Store, block, warn, rotate, most uint64) {
	r.t.Helper()
	cfg := kms.Config{Catalog: store, Groups: []kms.GroupConfig{r.group}}
	k, err := kms.Open(r.t.Context(), cfg.WithWrapLimits(block, warn, rotate, most))
	if err != nil {
		r.t.Fatal(err)
	}
	r.KMS = k
}

func (r *rig) wantWraps(name string, want ...uint64) {
	r.t.Helper()
	key, err := r.Key(r.t.Context(), name)
	if err != nil {
		r.t.Fatal(err)
	}
	var got []uint64
	for _, v := range key.Versions {
		got = append(got, v.Wraps)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		r.t.Errorf("the versions of key %s have wrapped %v times, want %v", name, got, want)
	}
}

func TestWrapsOfEachVersionAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		if _, err := r.CreateMasterKey(t.Context(), "sign", kms.KeyOptions{Type: "ec-p256"}); err != nil {
			t.Fatal(err)
		}
		r.wantWraps("shop", 0)
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for range 20 {
					r.wrap("shop")
				}
			})
		}
		wg.Wait()
		r.wantUnwrap("shop", r.wrap("shop"))
		r.wantWraps("shop", 321)
		if _, err := r.Rotate(t.Context(), "shop"); err != nil {
			t.Fatal(err)
		}
		old := r.wrap("shop")
		if _, err := r.Rewrap(t.Context(), "shop", old, []byte("aad")); err != nil {
			t.Fatal(err)
		}
		if _, err := r.DataKey(t.Context(), "shop", 32, nil); err != nil {
			t.Fatal(err)
		}
		r.wantWraps("shop", 321, 3)
		r.wantWraps("sign", 0)
	})
}

func TestAfterACrashACountGoesOnFromItsBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		store := catalogtest.NewCrasher(r.disk.Reopen(), 0)
		r.startWithLimits(store, 10, math.MaxUint64, math.MaxUint64, math.MaxUint64)
		r.create("shop")
		for range 33 {
			r.wrap("shop")
			synctest.Wait() // until the bound is written, which no wrap waits for
		}
		r.wantWraps("shop", 33)
		store.Crash()
		r.stop()

		r.startWithLimits(r.disk.Reopen(), 10, math.MaxUint64, math.MaxUint64, math.MaxUint64)
		defer r.stop()
		key, err := r.Key(t.Context(), "shop")
		if err != nil || key.Versions[0].Wraps < 33 || key.Versions[0].Wraps > 33+10 {
			t.Errorf("after the crash the version has wrapped %d times, %v, want 33 to 43", key.Versions[0].Wraps, err)
		}
		before := key.Versions[0].Wraps
		r.wrap("shop")
		r.wantWraps("shop", before+1)
	})
}

func TestAVersionThatHasWrappedVeryOftenIsToldOfOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		r.startWithLimits(r.disk.Reopen(), 4, 20, math.MaxUint64, math.MaxUint64)
		defer r.stop()
		r.create("shop")
		var alarms atomic.Int64
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() {
			for e := range r.Events(ctx) {
				if e.Type == api.EventKey && e.Alarm && e.Key == "shop" && strings.Contains(e.Cause, "version 1 has wrapped") {
					alarms.Add(1)
				}
			}
		}()
		synctest.Wait()
		for i := range 60 {
			r.wrap("shop")
			synctest.Wait()
			if n := alarms.Load(); i < 19 && n != 0 || i >= 23 && n != 1 {
				t.Fatalf("after %d wraps there were %d alarms", i+1, n)
			}
		}
		if n := r.Status().Groups[0].WearingOut; n != 1 {
			t.Errorf("%d keys wear out, want 1", n)
		}
		if _, err := r.Rotate(t.Context(), "shop"); err != nil {
			t.Fatal(err)
		}
		if n := r.Status().Groups[0].WearingOut; n != 0 {
			t.Errorf("after the rotation %d keys wear out", n)
		}
	})
}

func TestAVersionIsReplacedBeforeItHasWrappedTooOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3)
		r.startWithLimits(r.disk.Reopen(), 4, 10, 20, 1000)
		defer r.stop()
		r.create("shop")
		first := r.wrap("shop")
		for range 30 {
			r.wrap("shop")
			synctest.Wait()
		}
		r.eventually(func() error {
			if key, err := r.Key(t.Context(), "shop"); err != nil || key.Primary != 2 {
				return fmt.Errorf("the primary version is %d, %v, want 2", key.Primary, err)
			}
			return nil
		})
		r.wantUnwrap("shop", first)
		r.wantVerified("shop")
	})
}

func TestNoVersionWrapsMoreOftenThanIsSafe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		r.startWithLimits(r.disk.Reopen(), 4, 10, math.MaxUint64, 50) // as when no version can be made
		r.create("shop")
		first := r.wrap("shop")
		var made, refused atomic.Int64
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range 10 {
					switch _, err := r.Wrap(t.Context(), "shop", []byte("x"), nil); {
					case err == nil:
						made.Add(1)
					case errors.Is(err, kms.ErrState):
						refused.Add(1)
					default:
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if made.Load() != 49 || refused.Load() != 31 {
			t.Errorf("%d wraps were made after the first and %d refused, want 49 and 31", made.Load(), refused.Load())
		}
		r.wantWraps("shop", 50)
		r.wantUnwrap("shop", first)
		synctest.Wait()
		r.stop()

		r.startWithLimits(r.disk.Reopen(), 4, 10, math.MaxUint64, 50)
		defer r.stop()
		_, err := r.Wrap(t.Context(), "shop", []byte("x"), nil)
		wantError(t, err, kms.ErrState, "version 1 of key shop has wrapped 50 times")
		if hint := api.AsError(err).Hint; hint != "rotate the key" {
			t.Errorf("the hint is %q", hint)
		}
		if _, err := r.Rotate(t.Context(), "shop"); err != nil {
			t.Fatal(err)
		}
		r.wantUnwrap("shop", r.wrap("shop"))
	})
}

// fullStore has no room for bounds while it is full.
type fullStore struct {
	catalog.Store
	full atomic.Bool
}

func (s *fullStore) Apply(ctx context.Context, changes ...catalog.Record) (uint64, error) {
	if s.full.Load() && changes[0].Kind == catalog.KindUsage {
		return 0, catalog.ErrFull
	}
	return s.Store.Apply(ctx, changes...)
}

func TestAFullDiskKeepsNobodyFromWrapping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		store := &fullStore{Store: r.disk.Reopen()}
		store.full.Store(true)
		r.startWithLimits(store, 10, math.MaxUint64, math.MaxUint64, math.MaxUint64)
		defer r.stop()
		r.create("shop")
		for range 25 {
			r.wrap("shop")
			synctest.Wait()
		}
		store.full.Store(false)
		<-time.After(time.Minute)
		for u, err := range catalog.New(r.disk.Reopen()).Usages(t.Context()) {
			if err != nil || u.Wraps < 25 {
				t.Errorf("the catalog has %d wraps, %v, want 25 or more", u.Wraps, err)
			}
			return
		}
		t.Error("the catalog has no bound")
	})
}
