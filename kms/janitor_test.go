package kms_test

import (
	"context"
	"iter"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/catalog"
	"kmsd/pluginproto"
)

// What becomes due while the janitor is busy is not due in its next round only, a minute later.
func TestWhatBecomesDueDuringARoundIsDoneAfterIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1).mustStart()
		defer r.stop()
		r.create("first")
		r.create("second")
		synctest.Wait() // for the janitor's look around after that
		r.hsms[0].driver().Script(memdriver.Fault{Call: memdriver.CallDestroy, Times: 1, Delay: 4 * time.Second})
		for name, window := range map[string]time.Duration{"first": 10 * time.Second, "second": 12 * time.Second} {
			if _, err := r.Destroy(t.Context(), name, window); err != nil {
				t.Fatal(err)
			}
		}
		<-time.After(15 * time.Second)
		synctest.Wait()
		for _, name := range []string{"first", "second"} {
			if key, err := r.Key(t.Context(), name); err != nil || key.State != kms.StateDestroyed {
				t.Errorf("key %s is %s, %v", name, key.State, err)
			}
		}
	})
}

// unsaid has a store of intents write the next change and not say so.
func (f *faulty) unsaid() {
	f.then(func(ctx context.Context, changes ...catalog.Record) (uint64, error) {
		if _, err := f.Store.Apply(ctx, changes...); err != nil {
			return 0, err
		}
		return 0, errDisk
	})
}

// Whoever gives a version up leaves word with the janitor, which may look at it before it is
// given up.
func TestAVersionThatIsGivenUpIsTakenBackAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		store := &faulty{Store: r.disk.Reopen(), kind: catalog.KindIntent}
		r.mustStartOn(store)
		defer r.stop()
		store.unsaid()
		if _, err := r.CreateMasterKey(t.Context(), "shop", kms.KeyOptions{}); err == nil {
			t.Fatal("the key is there")
		}
		synctest.Wait()
		if err := r.consistent(); err != nil {
			t.Error(err)
		}
	})
}

// slowReader is a store whose lists of intents arrive late.
type slowReader struct {
	catalog.Store
	mu   sync.Mutex // guards late
	late func()     // called once, between the reading of intents and their arrival; nil: they are not late
}

func (s *slowReader) List(ctx context.Context, kind catalog.Kind, prefix, after string, limit int) iter.Seq2[catalog.Record, error] {
	if kind != catalog.KindIntent {
		return s.Store.List(ctx, kind, prefix, after, limit)
	}
	return func(yield func(catalog.Record, error) bool) {
		var all []catalog.Record
		for r, err := range s.Store.List(ctx, kind, prefix, after, limit) {
			if err != nil {
				yield(r, err)
				return
			}
			all = append(all, r)
		}
		s.mu.Lock()
		late := s.late
		s.late = nil
		s.mu.Unlock()
		if late != nil {
			late()
		}
		for _, r := range all {
			if !yield(r, nil) {
				return
			}
		}
	}
}

func TestAVersionThatIsTakenBackWhileTheJanitorLooksIsNoFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		written := &faulty{Store: r.disk.Reopen(), kind: catalog.KindIntent}
		store := &slowReader{Store: written}
		r.mustStartOn(store)
		defer r.stop()
		synctest.Wait()

		hold, given := make(chan struct{}), make(chan error, 1)
		r.hsms[0].driver().Script(memdriver.Fault{Call: memdriver.CallGenerate, Times: 1, Hang: hold,
			Err: pluginproto.Errorf(pluginproto.ClassCaller, "generating", "it is not allowed")})
		go func() {
			_, err := r.CreateMasterKey(t.Context(), "slow", kms.KeyOptions{})
			given <- err
		}()
		synctest.Wait()
		store.mu.Lock()
		store.late = func() {
			close(hold)
			if err := <-given; err == nil {
				t.Error("the slow key is there")
			}
		}
		store.mu.Unlock()
		written.unsaid()
		if _, err := r.CreateMasterKey(t.Context(), "other", kms.KeyOptions{}); err == nil {
			t.Error("the other key is there")
		}
		synctest.Wait()
		if err := r.consistent(); err != nil {
			t.Error(err)
		}
		if strings.Contains(r.log.String(), "janitor could not finish") {
			t.Errorf("the log has a fault of the janitor's:\n%s", r.log)
		}
	})
}
