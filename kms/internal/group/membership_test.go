package group_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// spec describes a new HSM of the rig.
func (r *rig) spec(name string) group.MemberConfig {
	h := newHSM(name)
	h.delay = r.hsms["a"].delay // one that took no time would stop the clock
	r.hsms[name] = h
	return group.MemberConfig{Name: name, Driver: "fake", Connect: h.connect}
}

// load runs commands until the returned function is called, which reports how many
// have succeeded; none may fail.
func (r *rig) load(clients int) (stop func() int64) {
	end := make(chan struct{})
	var served atomic.Int64
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for !closed(end) {
				if _, err := r.do(); err != nil {
					r.t.Errorf("a command failed: %v", err)
				}
				served.Add(1)
			}
		})
	}
	return func() int64 {
		close(end)
		wg.Wait()
		return served.Load()
	}
}

func (r *rig) slow(d time.Duration) {
	for _, h := range r.hsms {
		h.set(func(h *hsm) { h.delay = d })
	}
}

// hasEvent reports whether an event of a member was told.
func (r *rig) hasEvent(typ, member, to string) bool {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.events, func(e api.Event) bool { return e.Type == typ && e.Member == member && e.To == to })
}

func TestAMemberThatIsAddedServesTheNextCommands(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil).start()
		r.slow(10 * time.Millisecond)
		stop := r.load(6)
		spec := r.spec("c")
		if err := r.Add(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		elapse(time.Second)
		stop()
		if n, _, _ := r.hsms["c"].count(); n < 50 {
			t.Errorf("the new member served %d commands", n)
		}
		r.wantGroup(api.GroupNormal)
		if !slices.Equal(r.Names(), []string{"a", "b", "c"}) || !r.hasEvent(api.EventMember, "c", "joined") {
			t.Errorf("the members are %v", r.Names())
		}
		if err := r.Add(t.Context(), spec); !errors.Is(err, group.ErrMemberExists) {
			t.Errorf("adding it twice says %v", err)
		}
	})
}

func TestAMemberThatCannotJoinLeavesTheGroupAsItWas(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*hsm)
		limit  time.Duration
		want   string
	}{
		"no power":         {func(h *hsm) { h.refusal = errors.New("no power") }, time.Minute, "no power"},
		"another domain":   {func(h *hsm) { h.domain = "other" }, time.Minute, "domain secret"},
		"it hangs":         {func(h *hsm) { h.frozen = make(chan struct{}) }, time.Second, "deadline exceeded"},
		"it is not a kin":  {func(h *hsm) { h.serial, h.name = "serial of a", "a" }, time.Minute, "same token"},
		"it fails its job": {func(h *hsm) { h.fault = func(pluginproto.Command) error { return errDevice() } }, time.Minute, "CKR_DEVICE_ERROR"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []string{"a", "b"}, nil).start()
				spec := r.spec("c")
				r.hsms["c"].set(c.change)
				ctx, cancel := context.WithTimeout(t.Context(), c.limit)
				defer cancel()
				began := time.Now()
				err := r.Add(ctx, spec)
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want %q", err, c.want)
				}
				if took := time.Since(began); took > c.limit+slack {
					t.Errorf("it took %v", took)
				}
				r.wantGroup(api.GroupNormal)
				if !slices.Equal(r.Names(), []string{"a", "b"}) || r.hasEvent(api.EventMember, "c", "joined") {
					t.Errorf("the members are %v", r.Names())
				}
				elapse(time.Hour)
				if _, _, n := r.hsms["c"].count(); n != 1 {
					t.Errorf("it was connected %d times", n)
				}
			})
		})
	}
}

func TestAGroupHasAtMost32Members(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a"}, nil).start()
		for i := range 31 {
			if err := r.Add(t.Context(), r.spec(fmt.Sprint("m", i))); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Add(t.Context(), r.spec("toomany")); err == nil || !strings.Contains(err.Error(), "32 members") {
			t.Errorf("the 33rd member: %v", err)
		}
		for i := range 100 { // a place that is free again is used again
			if err := r.Remove(t.Context(), fmt.Sprint("m", i), false); err != nil {
				t.Fatal(err)
			}
			if err := r.Add(t.Context(), r.spec(fmt.Sprint("m", i+31))); err != nil {
				t.Fatal(err)
			}
		}
		by := map[string]bool{}
		for range 32 {
			by[r.mustDo()] = true
		}
		if len(by) != 32 {
			t.Errorf("%d members serve, want 32", len(by))
		}
	})
}

func TestNoCommandFailsBecauseAMemberLeaves(t *testing.T) {
	for name, leave := range map[string]func(*rig, context.Context) error{
		"removed":  func(r *rig, ctx context.Context) error { return r.Remove(ctx, "b", false) },
		"replaced": func(r *rig, ctx context.Context) error { return r.Replace(ctx, r.spec("b")) },
		"drained":  func(r *rig, ctx context.Context) error { return r.Drain(ctx, "b", false) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, three, nil).start()
				r.slow(300 * time.Millisecond)
				old := r.hsms["b"]
				stop := r.load(9)
				elapse(100 * time.Millisecond)
				began := time.Now()
				if err := leave(r, t.Context()); err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took < 200*time.Millisecond || took > 2*time.Second {
					t.Errorf("it took %v, want the time of what was in flight", took)
				}
				before, _, _ := old.count()
				elapse(time.Second)
				stop()
				if after, _, _ := old.count(); after != before {
					t.Errorf("it served %d commands after it had left", after-before)
				}
				if name != "drained" {
					if old.logouts != 1 {
						t.Errorf("it logged out %d times", old.logouts)
					}
					if !closed(old.conns[0].done) {
						t.Error("its driver still runs")
					}
				}
				if m := r.Status().Members; name == "removed" && len(m) != 2 || name != "removed" && len(m) != 3 {
					t.Errorf("the members are %+v", m)
				}
			})
		})
	}
}

func TestARemovalWaitsForTheKeyOperationThatIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		release, err := r.Lease(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		b, err := r.Member("b")
		if err != nil {
			t.Fatal(err)
		}
		removed := make(chan error, 1)
		go func() { removed <- r.Remove(t.Context(), "b", false) }()
		elapse(time.Second)
		r.wantState("b", api.MemberDraining)
		for range 3 { // between two calls nothing is in flight
			if err := generate(pluginproto.AES256)(t.Context(), b); err != nil {
				t.Errorf("a key operation that had begun failed: %v", err)
			}
			elapse(time.Second)
		}
		release()
		if err := <-removed; err != nil {
			t.Error(err)
		}
		if _, err := r.Member("b"); !errors.Is(err, group.ErrUnknownMember) {
			t.Errorf("got %v", err)
		}
	})
}

func TestAMemberThatHangsIsRemovedAtTheDeadlineAndItsCommandsGoElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, func(c *group.Config) { c.ProbeInterval = 10 * time.Second }).start()
		r.hsms["b"].freeze()
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() { r.mustDo() })
		}
		elapse(time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if err := r.Remove(ctx, "b", false); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if took := time.Since(began); took > time.Second+slack {
			t.Errorf("the removal took %v", took)
		}
		wg.Wait()
		if took := time.Since(began); took > time.Second+slack {
			t.Errorf("the commands took %v", took)
		}
		elapse(10 * time.Second)
		if !slices.Equal(r.Names(), []string{"a", "c"}) || !closed(r.hsms["b"].conns[0].done) {
			t.Errorf("the members are %v", r.Names())
		}
	})
}

func TestTheLastActiveMemberStaysUnlessForced(t *testing.T) {
	for name, change := range map[string]func(*rig, bool) error{
		"removed":        func(r *rig, force bool) error { return r.Remove(r.t.Context(), "a", force) },
		"drained":        func(r *rig, force bool) error { return r.Drain(r.t.Context(), "a", force) },
		"made a standby": func(r *rig, force bool) error { return r.SetStandby("a", true, force) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []string{"a", "s*"}, nil).start()
				if err := change(r, false); !errors.Is(err, group.ErrLastActive) {
					t.Errorf("got %v", err)
				}
				r.wantState("a", api.MemberActive)
				if err := change(r, true); err != nil {
					t.Error(err)
				}
				r.wantGroup(api.GroupStandbyServing)
				r.mustDo()
			})
		})
	}
	t.Run("the only member is never removed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, []string{"a"}, nil).start()
			if err := r.Remove(t.Context(), "a", true); !errors.Is(err, group.ErrLastActive) {
				t.Errorf("got %v", err)
			}
			r.mustDo()
		})
	})
}

func TestAMemberCanBeDrainedResumedReplacedAndRemovedInEveryState(t *testing.T) {
	states := map[string]func(*rig, *hsm){
		"active": func(*rig, *hsm) {},
		"silent": func(_ *rig, h *hsm) { h.freeze(); elapse(5 * time.Second) },
		"down": func(_ *rig, h *hsm) {
			h.set(func(h *hsm) { h.refusal = errors.New("no power") })
			h.crash()
			elapse(time.Second)
		},
		"failed": func(_ *rig, h *hsm) {
			h.set(func(h *hsm) { h.refusal = &pluginproto.Error{Class: pluginproto.ClassMember, Permanent: true} })
			h.crash()
			elapse(time.Second)
		},
		"being connected": func(_ *rig, h *hsm) {
			h.crash()
			h.freeze()
			elapse(time.Second)
		},
		"draining": func(r *rig, _ *hsm) { _ = r.Drain(r.t.Context(), "b", false) },
		"drained and down": func(r *rig, h *hsm) {
			_ = r.Drain(r.t.Context(), "b", false)
			h.crash()
			elapse(time.Second)
		},
	}
	mend := func(h *hsm) {
		h.set(func(h *hsm) {
			if h.frozen != nil {
				close(h.frozen)
			}
			h.frozen, h.refusal = nil, nil
		})
	}
	for name, bring := range states {
		t.Run(name+", drained and resumed", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, three, nil).start()
				bring(r, r.hsms["b"])
				if err := r.Drain(t.Context(), "b", false); err != nil {
					t.Fatal(err)
				}
				mend(r.hsms["b"])
				elapse(time.Hour)
				if m := r.member("b"); m.State != api.MemberDraining && m.State != api.MemberDown || !strings.Contains(m.Reason, "drained") || m.NextRecovery != nil {
					t.Errorf("drained, it shows %+v", m)
				}
				if err := r.Resume(t.Context(), "b"); err != nil {
					t.Errorf("resuming: %v", err)
				}
				r.wantGroup(api.GroupNormal)
				if m := r.member("b"); m.Reason != "" || m.CKR != "CKR_OK" || m.RecoveryAttempts != 0 {
					t.Errorf("resumed, it shows %+v", m)
				}
			})
		})
		t.Run(name+", replaced", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, three, nil).start()
				old := r.hsms["b"]
				bring(r, old)
				if err := r.Replace(t.Context(), r.spec("b")); err != nil {
					t.Fatal(err)
				}
				r.wantGroup(api.GroupNormal)
				mend(old)
				elapse(time.Minute)
				if !slices.Equal(r.Names(), three) {
					t.Errorf("the members are %v", r.Names())
				}
				for _, c := range old.conns {
					if !closed(c.done) {
						t.Error("an old driver still runs")
					}
				}
			})
		})
		t.Run(name+", removed twice at once", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, three, nil).start()
				h := r.hsms["b"]
				bring(r, h)
				var wg sync.WaitGroup
				for range 2 {
					wg.Go(func() {
						if err := r.Remove(t.Context(), "b", false); err != nil && !errors.Is(err, group.ErrUnknownMember) {
							t.Errorf("removing: %v", err)
						}
					})
				}
				wg.Wait()
				mend(h)
				r.wantGroup(api.GroupNormal)
				_, _, before := h.count()
				elapse(time.Hour)
				if _, _, n := h.count(); n != before || !slices.Equal(r.Names(), []string{"a", "c"}) {
					t.Errorf("it was connected again, or the members are %v", r.Names())
				}
				if !r.hasEvent(api.EventMember, "b", "removed") {
					t.Error("nobody was told")
				}
			})
		})
		t.Run(name+", removed while the group closes", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, three, nil).start()
				bring(r, r.hsms["b"])
				next, guest, late := r.spec("c"), r.spec("d"), r.spec("e")
				var wg sync.WaitGroup
				wg.Go(func() { _ = r.Remove(t.Context(), "b", false) })
				wg.Go(func() { _ = r.Replace(t.Context(), next) })
				wg.Go(func() { _ = r.Add(t.Context(), guest) })
				r.Close()
				wg.Wait()
				for what, err := range map[string]error{
					"Add": r.Add(t.Context(), late), "Remove": r.Remove(t.Context(), "a", true),
					"Drain": r.Drain(t.Context(), "a", true), "Resume": r.Resume(t.Context(), "a"),
					"SetStandby": r.SetStandby("a", true, true), "Readmit": r.Readmit(t.Context(), "a"),
				} {
					if !errors.Is(err, group.ErrClosed) {
						t.Errorf("%s of a closed group says %v", what, err)
					}
				}
			})
		})
	}
}
