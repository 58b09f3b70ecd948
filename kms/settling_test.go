package kms_test

import (
	"context"
	"iter"
	"sync"
	"testing"
	"testing/synctest"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/catalog"
	"kmsd/pluginproto"
)

// browsed is a store in which something happens when somebody has just listed a kind.
type browsed struct {
	catalog.Store

	mu   sync.Mutex // guards what follows
	kind catalog.Kind
	do   func() // once; nil: nothing
}

func (s *browsed) after(kind catalog.Kind, do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kind, s.do = kind, do
}

func (s *browsed) List(ctx context.Context, kind catalog.Kind, prefix, after string, limit int) iter.Seq2[catalog.Record, error] {
	return func(yield func(catalog.Record, error) bool) {
		for r, err := range s.Store.List(ctx, kind, prefix, after, limit) {
			if !yield(r, err) {
				return
			}
		}
		s.mu.Lock()
		var do func()
		if kind == s.kind {
			do, s.do = s.do, nil
		}
		s.mu.Unlock()
		if do != nil {
			do()
		}
	}
}

// busyOnce has the next call of a kind find no session.
func (h *hsm) busyOnce(call memdriver.Call) {
	h.driver().Script(memdriver.Fault{Call: call, Times: 1,
		Err: &pluginproto.Error{Class: pluginproto.ClassBusy, CKR: 0xB1, Op: "opening a session"}})
}

// A key that could not be made is taken back without the lease, so also while the janitor
// is at what was left before.
func TestWhatIsLeftWhileTheJanitorIsAtWorkIsNotForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3)
		store := &browsed{Store: r.disk.Reopen()}
		r.mustStartOn(store)
		defer r.stop()
		r.create("shop")
		synctest.Wait() // for the janitor's look around after that
		fail := func(name string) {
			r.hsms[0].busyOnce(memdriver.CallGenerate)
			r.hsms[1].busyOnce(memdriver.CallDestroy)
			if _, err := r.CreateMasterKey(t.Context(), name, kms.KeyOptions{}); err == nil {
				t.Errorf("key %s was made", name)
			}
		}
		again := false
		store.after(catalog.KindTombstone, func() { again = true; fail("second") })
		fail("first")
		r.wantConsistent()
		if !again {
			t.Error("nothing has happened while the janitor was at work")
		}
	})
}
