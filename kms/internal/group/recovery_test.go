package group_test

import (
	"context"
	"errors"
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

func TestALostMemberIsBackAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		r.hsms["b"].crash()
		elapse(100 * time.Millisecond)
		r.wantState("b", api.MemberActive)
		want := []string{"probing", "syncing", "active", "down", "probing", "syncing", "active"}
		if got := r.path("b"); !slices.Equal(got, want) {
			t.Errorf("the member went through %v, want %v", got, want)
		}
	})
}

// TestACommandThatComesAsAMemberComesBackIsServed: whether it finds the member on its way
// back, or there, or comes in between.
func TestACommandThatComesAsAMemberComesBackIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a"}, func(c *group.Config) {
			connect := c.Members[0].Connect
			c.Members[0].Connect = func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
				elapse(time.Second)
				return connect(ctx)
			}
		}).start()
		for range 20 {
			elapse(time.Minute) // it is no member that is lost again and again
			r.hsms["a"].crash()
			synctest.Wait()
			var wg sync.WaitGroup
			for range 100 {
				wg.Go(func() {
					elapse(time.Second)
					if _, err := r.do(); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
		}
	})
}

func TestRecoveryBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) { c.Recovery.Interval = 4 * time.Second }).start()
		h := r.hsms["a"]
		h.set(func(h *hsm) { h.refusal, h.attempts = errors.New("no power"), nil })
		lost := time.Now()
		h.crash()
		elapse(30 * time.Second)
		h.mu.Lock()
		attempts := h.attempts
		h.mu.Unlock()
		want := []time.Duration{0, 250, 500, 1000, 2000, 4000, 4000, 4000} // ms, before each attempt
		for i, w := range want {
			w *= time.Millisecond
			pause := attempts[i].Sub(lost)
			lost = attempts[i]
			if pause < w*8/10 || pause > w*12/10 {
				t.Errorf("attempt %d came after %v, want %v and at most a fifth more or less", i+1, pause, w)
			}
		}
		m := r.member("a")
		if m.RecoveryAttempts != len(attempts) || m.NextRecovery == nil || m.CKR != "CKR_TOKEN_NOT_PRESENT" || m.Reason != "no power" {
			t.Errorf("while it is away the member shows %+v", m)
		}
		h.set(func(h *hsm) { h.refusal = nil })
		elapse(5 * time.Second)
		r.wantState("a", api.MemberActive)
		if m := r.member("a"); m.RecoveryAttempts != 0 || m.NextRecovery != nil {
			t.Errorf("when it is back the member shows %d attempts and the next at %v", m.RecoveryAttempts, m.NextRecovery)
		}
	})
}

func TestAMemberThatKeepsCrashingIsSlowedDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil).start()
		h := r.hsms["a"]
		h.set(func(h *hsm) {
			h.fault = func(cmd pluginproto.Command) error {
				if cmd.Op != pluginproto.OpProbe {
					return errDevice()
				}
				return nil
			}
		})
		for began := time.Now(); time.Since(began) < time.Minute; elapse(10 * time.Millisecond) {
			r.mustDo()
		}
		if _, n, _ := h.count(); n < 20 || n > 60 {
			t.Errorf("the driver was started %d times in a minute, want about one in two seconds", n)
		}
	})
}

func TestRecoveryGivesUpAfterItsRetriesAndStartsAgainOnRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) { c.Recovery.Retries = 3 }).start()
		h := r.hsms["a"]
		h.set(func(h *hsm) { h.refusal, h.attempts = errors.New("no power"), nil })
		h.crash()
		elapse(time.Hour)
		if _, _, n := h.count(); n != 3 {
			t.Errorf("%d attempts, want 3", n)
		}
		if m := r.member("a"); m.NextRecovery != nil || m.State != api.MemberDown {
			t.Errorf("given up, the member is %s and next tried at %v", m.State, m.NextRecovery)
		}
		if err := r.Recover(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), "no power") {
			t.Errorf("recovering it says %v", err)
		}
		h.set(func(h *hsm) { h.refusal = nil })
		if err := r.Recover(t.Context(), "a"); err != nil {
			t.Error(err)
		}
		r.wantState("a", api.MemberActive)
		if err := r.Recover(t.Context(), "z"); !errors.Is(err, group.ErrUnknownMember) {
			t.Errorf("recovering a stranger says %v", err)
		}
	})
}

func TestManualAndAutomaticRecoveryAreOneAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running, most atomic.Int32
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) {
			connect := c.Members[0].Connect
			c.Members[0].Connect = func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
				most.Store(max(most.Load(), running.Add(1)))
				defer running.Add(-1)
				elapse(300 * time.Millisecond)
				return connect(ctx)
			}
		}).start()
		h := r.hsms["a"]
		h.set(func(h *hsm) { h.refusal = errors.New("no power") })
		h.crash()
		synctest.Wait()
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if err := r.Recover(t.Context(), "a"); err == nil {
					t.Error("a recovery without power succeeded")
				}
			})
			elapse(50 * time.Millisecond)
		}
		wg.Wait()
		if most.Load() != 1 {
			t.Errorf("%d attempts ran at a time, want one", most.Load())
		}
	})
}

func TestManualModeTriesOnlyWhenAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) { c.Recovery.Manual = true }).start()
		r.hsms["a"].crash()
		elapse(time.Hour)
		r.wantState("a", api.MemberDown)
		if err := r.Recover(t.Context(), "a"); err != nil {
			t.Error(err)
		}
		r.wantState("a", api.MemberActive)
		if err := r.Recover(t.Context(), "a"); err != nil {
			t.Errorf("recovering a member that serves says %v", err)
		}
	})
}

func TestAPermanentFailureIsFailedAndTriedOncePerInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wrongPIN := &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRPINIncorrect, Op: "logging in to token a", Permanent: true}
		r := newRig(t, []string{"a", "b"}, nil)
		h := r.hsms["a"]
		h.refusal = wrongPIN
		r.start()
		elapse(10 * time.Minute)
		m := r.member("a")
		if m.State != api.MemberFailed || m.CKR != "CKR_PIN_INCORRECT" || !strings.Contains(m.Reason, "logging in to token a") {
			t.Errorf("the member shows %+v", m)
		}
		if _, _, n := h.count(); n < 8 || n > 14 {
			t.Errorf("%d attempts in 10 minutes, want about one a minute", n)
		}
		if got := r.path("a"); !slices.Equal(got, []string{"probing", "failed"}) {
			t.Errorf("the member went through %v; the same failure again is no news", got)
		}
		h.set(func(h *hsm) { h.refusal = nil })
		elapse(90 * time.Second)
		r.wantState("a", api.MemberActive)
	})
}

func TestAMemberThatIsAbsentAtStartIsRecovered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil)
		r.hsms["c"].refusal = errors.New("no power")
		r.start()
		r.wantGroup(api.GroupDegraded)
		r.hsms["c"].set(func(h *hsm) { h.refusal = nil })
		elapse(time.Second)
		r.wantGroup(api.GroupNormal)
	})
}

func TestStartDoesNotWaitForAMemberThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) {
			c.Members[1].Connect = func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
				<-ctx.Done()
				return nil, pluginproto.TokenInfo{}, ctx.Err()
			}
		})
		began := time.Now()
		r.start()
		if d := time.Since(began); d != 2*time.Second {
			t.Errorf("Start took %v, want 2s", d)
		}
		r.wantGroup(api.GroupSole)
		if by := r.mustDo(); by != "a" {
			t.Errorf("answered by %s", by)
		}
		if m := r.Status().Members[1]; m.State != api.MemberProbing || !strings.Contains(m.Reason, "its library waits for the HSM") {
			t.Errorf("while it hangs: %s, %q", m.State, m.Reason)
		}
		elapse(29 * time.Second)
		if m := r.Status().Members[1]; !strings.Contains(m.Reason, "within 30s; its library may be waiting") {
			t.Errorf("after its time: %s, %q", m.State, m.Reason)
		}
	})
}

func TestStartWaitsLongerWhileNobodyServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) {
			for i := range c.Members {
				c.Members[i].Connect = func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
					<-ctx.Done()
					return nil, pluginproto.TokenInfo{}, ctx.Err()
				}
			}
		})
		began := time.Now()
		r.start()
		if d := time.Since(began); d != 10*time.Second {
			t.Errorf("Start took %v, want 10s", d)
		}
		r.wantGroup(api.GroupLost)
	})
}

func TestStartBringsUpAGroupWithNobodyThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a"}, nil)
		r.hsms["a"].refusal = errors.New("no power")
		r.start()
		r.wantGroup(api.GroupLost)
		if _, err := r.do(); !errors.Is(err, group.ErrLost) {
			t.Errorf("got %v", err)
		}
	})
}

func TestStandbysServeWhenNobodyElseDoesAndStepBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "s1*", "s2*"}, nil).start()
		r.wantGroup(api.GroupNormal)
		for range 10 {
			if by := r.mustDo(); by != "a" {
				t.Fatalf("answered by %s while an active member is there", by)
			}
		}
		r.hsms["a"].set(func(h *hsm) { h.refusal = errors.New("no power") })
		r.hsms["a"].crash()
		elapse(time.Millisecond)
		r.wantGroup(api.GroupStandbyServing)
		by := map[string]int{}
		for range 10 {
			by[r.mustDo()]++
		}
		if by["s1"] != 5 || by["s2"] != 5 {
			t.Errorf("served by %v, want both standbys", by)
		}
		if p := r.Status().Primary; p != "s1" {
			t.Errorf("the primary is %q, want s1", p)
		}
		r.hsms["a"].set(func(h *hsm) { h.refusal = nil })
		elapse(5 * time.Second)
		r.wantGroup(api.GroupNormal)
		if by := r.mustDo(); by != "a" {
			t.Errorf("answered by %s after the active member is back", by)
		}
		r.wantState("s1", api.MemberStandby)
	})
}

func TestATokenThatCannotBelongIsRefused(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*hsm)
		want   string
	}{
		{"another domain", func(h *hsm) { h.domain = "other" }, "both need the same one"},
		{"the token of another member", func(h *hsm) { h.serial, h.name = "serial of a", "a" }, "member a has the same token"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []string{"a", "b"}, func(cfg *group.Config) {
					connect := cfg.Members[1].Connect
					cfg.Members[1].Connect = func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
						elapse(time.Second) // a is the first
						return connect(ctx)
					}
				})
				r.hsms["b"].set(c.change)
				r.start()
				if m := r.member("b"); m.State != api.MemberFailed || !strings.Contains(m.Reason, c.want) {
					t.Errorf("the member is %s: %s", m.State, m.Reason)
				}
				select {
				case <-r.hsms["b"].conns[0].Done():
				default:
					t.Error("the refused driver still runs")
				}
			})
		})
	}
}

func TestAnIdleMemberThatFailsItsProbesIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) { c.Recovery.Manual = true }).start()
		r.hsms["a"].set(func(h *hsm) {
			h.fault = func(pluginproto.Command) error {
				return &pluginproto.Error{Class: pluginproto.ClassUnknown, CKR: pluginproto.CKRGeneralError, Op: "probing"}
			}
		})
		elapse(15 * time.Second)
		r.wantState("a", api.MemberDown)
		if m := r.member("a"); m.CKR != "CKR_DEVICE_ERROR" || !strings.Contains(m.Reason, "CKR_GENERAL_ERROR") {
			t.Errorf("the member shows %s, %s", m.CKR, m.Reason)
		}
	})
}
