package group_test

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/internal/group"
)

// The tests of this file have two things happen in the same moment. Those that depend on
// an order which is rare say something only when it comes; make shake makes it come.

// TestWhatAMemberHasAnsweredIsNotLostWithIt: it is removed as soon as nothing is in flight
// on it any more, which is a moment before its last answers have been brought to those who
// wait for them. Nobody else could give these.
func TestWhatAMemberHasAnsweredIsNotLostWithIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) { c.Recovery.Manual = true }).start()
		r.hsms["b"].set(func(h *hsm) { h.refusal = errors.New("no power") })
		r.hsms["b"].crash()
		r.hsms["a"].set(func(h *hsm) { h.delay = 10 * time.Millisecond })
		for range 100 {
			elapse(time.Millisecond)
			a, err := r.Member("a")
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					if _, err := r.do(); err != nil {
						t.Errorf("a command: %v", err)
					}
				})
				wg.Go(func() {
					if _, err := a.List(t.Context()); err != nil {
						t.Errorf("a call: %v", err)
					}
				})
			}
			elapse(5 * time.Millisecond)
			if err := r.Remove(t.Context(), "a", true); err != nil {
				t.Fatal(err)
			}
			wg.Wait()
			if t.Failed() {
				return
			}
			if err := r.Add(t.Context(), group.MemberConfig{Name: "a", Driver: "fake", Connect: r.hsms["a"].connect}); err != nil {
				t.Fatal(err)
			}
		}
	})
}
