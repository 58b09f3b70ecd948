package kms_test

import (
	"testing"
	"testing/synctest"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/catalog"
	"kmsd/pluginproto"
)

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
		store := &interrupted{Store: r.disk.Reopen()}
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
		store.after(catalog.KindTombstone, true, func() { again = true; fail("second") })
		fail("first")
		r.wantConsistent()
		if !again {
			t.Error("nothing has happened while the janitor was at work")
		}
	})
}
