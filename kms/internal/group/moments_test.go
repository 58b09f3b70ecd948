package group_test

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// The tests of this file have two things happen in the same moment. Those that depend on
// an order which is rare say something only when it comes; make shake makes it come.

// TestWhoAsksWhileABrokenOffAdmissionEndsGetsAnAttempt: the admission may need a moment to
// notice its end. Who asks in that moment has seen it already, and wants another attempt,
// which nobody else makes when recovery is manual.
func TestWhoAsksWhileABrokenOffAdmissionEndsGetsAnAttempt(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(r *rig)
		seen api.MemberState
		ask  func(r *rig, ctx context.Context) error
	}{
		"it fell silent": {
			func(r *rig) { r.hsms["b"].freeze() }, api.MemberProbing,
			func(r *rig, ctx context.Context) error { r.hsms["b"].thaw(); return r.Recover(ctx, "b") },
		},
		"its driver ended": {
			func(r *rig) { r.hsms["b"].crash() }, api.MemberDown,
			func(r *rig, ctx context.Context) error { return r.Recover(ctx, "b") },
		},
		"its driver ended, and it was drained and resumed": {
			func(r *rig) { r.hsms["b"].crash() }, api.MemberDown,
			func(r *rig, ctx context.Context) error {
				return errors.Join(r.Drain(ctx, "b", false), r.Resume(ctx, "b"))
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var linger bool
				r := newRig(t, three, func(c *group.Config) {
					c.Recovery.Manual = true
					c.Admit = func(ctx context.Context, m group.Member, _ bool) (found group.Admission, err error) {
						if linger && m.Name() == "b" {
							<-ctx.Done()
							elapse(200 * time.Millisecond)
						}
						return found, ctx.Err()
					}
				}).start()
				r.hsms["b"].crash()
				elapse(time.Millisecond)
				linger = true
				first := make(chan error, 1)
				go func() { first <- r.Recover(t.Context(), "b") }()
				elapse(time.Second)
				r.wantState("b", api.MemberSyncing)
				c.end(r)
				for r.member("b").State != c.seen {
					elapse(10 * time.Millisecond)
				}
				linger = false
				if err := c.ask(r, t.Context()); err != nil {
					t.Errorf("got %v, want an attempt that succeeds", err)
				}
				r.wantState("b", api.MemberActive)
				if err := <-first; err == nil {
					t.Error("who asked before was told of a success")
				}
			})
		})
	}
}

func TestAGroupMayBeClosedInTheMomentOfItsStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for range 200 {
			r := newRig(t, three, nil)
			for _, h := range r.hsms {
				h.refusal = errors.New("no power")
			}
			var wg sync.WaitGroup
			wg.Go(func() { _ = r.Start(context.Background()) })
			wg.Go(r.Close)
			wg.Wait()
			r.Close()
		}
	})
}

func TestWhoeverClosesAGroupWaitsForItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		r.slow(time.Second) // also to log out
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				r.Close()
				for name, h := range r.hsms {
					if !closed(h.conns[0].done) {
						t.Errorf("the group is said to be closed, and the driver of %s runs", name)
					}
				}
			})
		}
		wg.Wait()
	})
}

// TestNobodyJoinsAGroupThatIsClosed: a member comes in step as the group is closed.
func TestNobodyJoinsAGroupThatIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for range 100 {
			last := make(chan struct{}, 1)
			r := newRig(t, []string{"a"}, func(c *group.Config) {
				c.Admit = func(_ context.Context, m group.Member, again bool) (found group.Admission, err error) {
					if m.Name() == "b" && again {
						last <- struct{}{}
					}
					return found, nil
				}
			})
			if err := r.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			joined := make(chan error, 1)
			go func() { joined <- r.Add(t.Context(), r.spec("b")) }()
			<-last
			r.Close()
			err := <-joined
			if path := r.path("b"); (err == nil) != slices.Contains(path, string(api.MemberActive)) || err == nil != slices.Contains(path, "joined") {
				t.Fatalf("who added the member was told %v, but it has been %v", err, path)
			}
		}
	})
}

// TestAMemberThatIsLostWhileItIsComparedIsNotFoundInStep: its loss comes a moment before
// the end of the comparison.
func TestAMemberThatIsLostWhileItIsComparedIsNotFoundInStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r *rig
		var lose bool
		r = newRig(t, []string{"a", "b"}, func(c *group.Config) {
			c.Admit = func(_ context.Context, m group.Member, last bool) (found group.Admission, err error) {
				if lose && last && m.Name() == "b" {
					lose = false
					r.hsms["b"].crash()
					for r.member("b").State == api.MemberActive {
						runtime.Gosched()
					}
				}
				return found, nil
			}
		}).start()
		for range 200 {
			lose = true
			if err := r.Readmit(t.Context(), "b"); err == nil {
				t.Fatal("a member that was lost is said to be in step")
			}
			elapse(time.Minute)
			r.wantState("b", api.MemberActive)
		}
	})
}

// TestADriverThatIsNotWantedIsGoneBeforeTheNextComes: a killed process may take a while to
// be gone, and a token has one driver at a time.
func TestADriverThatIsNotWantedIsGoneBeforeTheNextComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil)
		h := r.hsms["b"]
		h.dying = 800 * time.Millisecond
		h.alone = func() { t.Error("two drivers of b run at once") }
		probes := 0
		h.fault = func(pluginproto.Command) error {
			if probes++; probes == 1 {
				return errDevice()
			}
			return nil
		}
		r.start()
		elapse(10 * time.Second)
		r.wantState("b", api.MemberActive)
	})
}

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
