package kms_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
	"kmsd/pluginproto"
)

// checkGroup asks for a check that must come to an end.
func (r *rig) checkGroup() api.GroupCheck {
	r.t.Helper()
	c, err := r.Check(r.t.Context(), "")
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

// mustStartOn opens the service on a store.
func (r *rig) mustStartOn(store catalog.Store) {
	r.t.Helper()
	if err := r.start(store); err != nil {
		r.t.Fatal(err)
	}
}

// wantFinding wants a finding on a member that contains a text.
func wantFinding(t *testing.T, c api.GroupCheck, member string, fault bool, text string) {
	t.Helper()
	for _, f := range c.Findings {
		if f.Member == member && f.Fault == fault && strings.Contains(f.Message, text) {
			return
		}
	}
	t.Errorf("no finding on %q (fault: %t) says %q; there are %+v", member, fault, text, c.Findings)
}

func TestCheckOfASoundGroupFindsNothingAndLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		if c := r.checkGroup(); !c.OK || len(c.Findings) != 0 || c.Group != "default" {
			t.Errorf("found %+v", c)
		}
		for _, h := range r.hsms { // it was really cloned to each
			if n := h.driver().Calls(memdriver.CallCloneStep); n == 0 {
				t.Errorf("%s was never asked", h.name)
			}
		}
		if err := r.consistent(); err != nil { // at once
			t.Error(err)
		}
	})
}

func TestCheckSaysWhatIsWrong(t *testing.T) {
	// CKR_FUNCTION_REJECTED, as a token says whose policy forbids it.
	refuses := &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: 0x200, Op: "unwrapping a key"}
	for _, c := range []struct {
		name    string
		disturb func(*testing.T, *rig)
		member  string
		fault   bool
		text    string
	}{
		{"a member is away", func(t *testing.T, r *rig) {
			r.hsms[1].leave()
			r.wantStates(active, down, active)
		}, "hsm-b", true, "is down since 20"},
		{"all members are away", func(t *testing.T, r *rig) {
			for _, h := range r.hsms {
				h.leave()
			}
			r.wantStates(down, down, down)
		}, "", true, "no member of the group serves"},
		{"a PIN is refused", func(t *testing.T, r *rig) {
			r.hsms[1].mu.Lock()
			r.hsms[1].pin = "wrong"
			r.hsms[1].mu.Unlock()
			r.hsms[1].driver().Crash()
			r.wantStates(active, failed, active)
		}, "hsm-b", true, "give it the right PIN"},
		{"a member takes no keys", func(t *testing.T, r *rig) {
			r.hsms[1].driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Err: refuses})
		}, "hsm-b", true, "takes keys from member hsm-a: CKR_FUNCTION_REJECTED: it refuses a clone of a canary key"},
		{"a member gives no keys", func(t *testing.T, r *rig) {
			r.hsms[1].driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Err: refuses})
		}, "hsm-b", true, "could not supply a key to member hsm-"},
		{"a member makes no keys", func(t *testing.T, r *rig) {
			r.hsms[2].driver().Script(memdriver.Fault{Call: memdriver.CallGenerate, Err: refuses})
		}, "hsm-c", true, "could not supply a key to member hsm-"},
		{"a member alters what it takes", func(t *testing.T, r *rig) {
			r.hsms[1].setStep(func(h *hsm) {
				for _, id := range h.token.Keys() {
					if n := len(r.hsms[1].token.Keys()); n > 1 { // the canary, not the key
						h.token.Corrupt(id)
					}
				}
			})
		}, "hsm-b", true, "so its token or its driver is broken"},
		{"a token has become a reason to worry since it was last asked", func(t *testing.T, r *rig) {
			r.hsms[1].driver().Tell(pluginproto.Fact{Name: "storage", Value: "97 % used", Warning: true}, pluginproto.Fact{Name: "clock", Value: "set"})
		}, "hsm-b", false, "storage: 97 % used"},
		{"keys were made while there was one member", func(t *testing.T, r *rig) {
			r.hsms[1].leave()
			r.hsms[2].leave()
			r.wantStates(active, down, down)
			if _, err := r.CreateMasterKey(t.Context(), "night", kms.KeyOptions{AllowDegraded: true}); err != nil {
				t.Fatal(err)
			}
		}, "", true, "1 key versions have fewer copies than their min_copies: night version 1 (on hsm-a)"},
		{"the only holder of a key is away", func(t *testing.T, r *rig) {
			r.hsms[1].leave()
			r.hsms[2].leave()
			r.wantStates(active, down, down)
			if _, err := r.CreateMasterKey(t.Context(), "night", kms.KeyOptions{AllowDegraded: true, MinCopies: 1}); err != nil {
				t.Fatal(err)
			}
			r.hsms[0].leave()
			r.hsms[1].come()
			r.wantStates(down, active, down)
		}, "", true, "1 key versions are on no member in step and cannot be used: night version 1 (on hsm-a)"},
		{"a key has one copy only", func(t *testing.T, r *rig) {
			r.hsms[1].leave()
			r.hsms[2].leave()
			r.wantStates(active, down, down)
			if _, err := r.CreateMasterKey(t.Context(), "night", kms.KeyOptions{MinCopies: 1}); err != nil {
				t.Fatal(err)
			}
		}, "", false, "1 key versions have one copy only: night version 1 (on hsm-a)"},
		{"a member has nobody to exchange keys with", func(t *testing.T, r *rig) {
			r.hsms[1].leave()
			r.hsms[2].leave()
			r.wantStates(active, down, down)
		}, "", false, "1 members are in step, so no key can be cloned"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3).mustStart()
				defer r.stop()
				r.create("shop")
				c.disturb(t, r)
				got := r.checkGroup()
				wantFinding(t, got, c.member, c.fault, c.text)
				if c.fault && got.OK {
					t.Error("it is OK all the same")
				}
			})
		})
	}
}

func TestCheckOfAMemberThatHangsEndsInTimeAndStillSaysTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.hsms[2].leave()
		r.wantStates(active, active, down)
		r.hsms[1].driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Hang: make(chan struct{})}) // its probes answer
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		got, err := r.Check(ctx, "")
		if err != nil || ctx.Err() != nil {
			t.Fatalf("Check = %v, its context: %v", err, ctx.Err())
		}
		wantFinding(t, got, "hsm-c", true, "is down since")
		wantFinding(t, got, "", false, "whether keys can be cloned is not known")
	})
}

func TestCheckOfAGroupThatThereIsNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1).mustStart()
		defer r.stop()
		_, err := r.Check(t.Context(), "other")
		wantError(t, err, kms.ErrNotFound, `there is no group "other"`)
	})
}

func TestACanaryIsLeftNowhere(t *testing.T) {
	t.Run("when kmsd crashes at a driver step", func(t *testing.T) {
		atEveryStep(t, func(t *testing.T, step int) (more bool) {
			r := newRig(t, 3)
			store := catalogtest.NewCrasher(r.disk.Reopen(), 1<<30)
			r.mustStartOn(store)
			r.create("shop")
			reached := r.interrupt(int64(step), func(*hsm) {
				store.Crash()
				for _, h := range r.hsms {
					h.leave()
				}
			})
			_, _ = r.Check(t.Context(), "") // nobody is left to hear the answer
			more = reached()
			r.stop()
			for _, h := range r.hsms {
				h.step = nil
				h.come()
			}
			r.mustStart()
			defer r.stop()
			r.wantConsistent()
			return more
		})
	})
	t.Run("when kmsd crashes at a catalog step", func(t *testing.T) {
		atEveryStep(t, func(t *testing.T, step int) (more bool) {
			r := newRig(t, 3)
			store := catalogtest.NewCrasher(r.disk.Reopen(), step)
			if err := r.start(store); err == nil {
				_, _ = r.CreateMasterKey(t.Context(), "shop", kms.KeyOptions{})
				_, _ = r.Check(t.Context(), "")
				r.stop()
			}
			r.mustStart()
			defer r.stop()
			r.wantConsistent()
			return store.Crashed()
		})
	})
	t.Run("when a member crashes", func(t *testing.T) {
		atEveryStep(t, func(t *testing.T, step int) (more bool) {
			r := newRig(t, 3).mustStart()
			defer r.stop()
			r.create("shop")
			reached := r.interrupt(int64(step), func(h *hsm) { h.driver().Crash() })
			r.checkGroup()
			r.wantConsistent()
			return reached()
		})
	})
	t.Run("when the caller goes away", func(t *testing.T) {
		atEveryStep(t, func(t *testing.T, step int) (more bool) {
			r := newRig(t, 3).mustStart()
			defer r.stop()
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			reached := r.interrupt(int64(step), func(*hsm) { leave() })
			if _, err := r.Check(ctx, ""); err != nil && !errors.Is(err, kms.ErrDeadline) {
				t.Errorf("Check = %v", err)
			}
			r.wantConsistent()
			return reached()
		})
	})
	t.Run("when the catalog fails", func(t *testing.T) {
		atEveryStep(t, func(t *testing.T, step int) (more bool) {
			r := newRig(t, 3)
			store := &flaky{Store: r.disk.Reopen()}
			r.mustStartOn(store)
			defer r.stop()
			store.mu.Lock()
			store.after = store.writes + step
			store.mu.Unlock()
			r.checkGroup()
			store.mu.Lock()
			more = store.writes >= store.after
			store.mu.Unlock()
			<-time.After(time.Minute) // the janitor has had its turn
			r.wantConsistent()
			return more
		})
	})
}

// atEveryStep runs a test in a bubble of its own for each step until one is not
// reached any more.
func atEveryStep(t *testing.T, run func(t *testing.T, step int) (more bool)) {
	for step, more := 1, true; more && !t.Failed(); step++ {
		t.Run(fmt.Sprintf("step %d", step), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { more = run(t, step) })
		})
	}
}
