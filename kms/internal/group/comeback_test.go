package group_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// causes returns the causes of a member's events of a type.
func (r *rig) causes(typ, member string) (causes []string, alarms int) {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if e.Type == typ && e.Member == member {
			causes = append(causes, e.Cause)
			if e.Alarm {
				alarms++
			}
		}
	}
	return causes, alarms
}

func TestRow123_TheFirstReportIsDeviceErrorAndLaterOnesTokenNotPresent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, func(c *group.Config) { c.Recovery.Manual = true }).start()
		h := r.hsms["b"]
		h.set(func(h *hsm) { h.refusal = errors.New("no power") })
		h.crash()
		elapse(time.Second)
		if m := r.member("b"); m.CKR != "CKR_DEVICE_ERROR" || m.State != api.MemberDown {
			t.Errorf("first it shows %s, %s", m.State, m.CKR)
		}
		_ = r.Recover(t.Context(), "b")
		if m := r.member("b"); m.CKR != "CKR_TOKEN_NOT_PRESENT" || m.Reason != "no power" {
			t.Errorf("then it shows %s, %s", m.CKR, m.Reason)
		}
		h.set(func(h *hsm) { h.refusal = nil })
		if err := r.Recover(t.Context(), "b"); err != nil {
			t.Error(err)
		}
		if m := r.member("b"); m.CKR != "CKR_OK" {
			t.Errorf("when it is back it shows %s", m.CKR)
		}
	})
}

func TestRow120_EveryAttemptIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) { c.Recovery.Manual = true }).start()
		if told, _ := r.causes(api.EventRecovery, "a"); len(told) != 0 {
			t.Errorf("a normal start is told as a recovery: %q", told)
		}
		h := r.hsms["a"]
		h.set(func(h *hsm) { h.refusal = errors.New("no power") })
		h.crash()
		elapse(time.Millisecond)
		for range 3 {
			_ = r.Recover(t.Context(), "a")
		}
		h.set(func(h *hsm) { h.refusal = nil })
		if err := r.Recover(t.Context(), "a"); err != nil {
			t.Error(err)
		}
		got, alarms := r.causes(api.EventRecovery, "a")
		want := "attempt 1 failed: no power|attempt 2 failed: no power|attempt 3 failed: no power|attempt 4 succeeded"
		if strings.Join(got, "|") != want || alarms != 0 {
			t.Errorf("told %q, want %q", got, want)
		}
		if m := r.member("a"); m.AttemptsTotal != 5 || m.RecoveryAttempts != 0 {
			t.Errorf("%d attempts in all, %d now; want 5 with the first, and 0", m.AttemptsTotal, m.RecoveryAttempts)
		}
	})
}

func TestW6_GivingUpIsAnAlarmAndASuccessEndsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) { c.Recovery.Retries = 3 }).start()
		h := r.hsms["a"]
		h.set(func(h *hsm) { h.refusal = errors.New("no power") })
		h.crash()
		elapse(time.Hour)
		m := r.member("a")
		if !m.GaveUp || m.RecoveryAttempts != 3 || m.NextRecovery != nil || !strings.Contains(m.Reason, "no power") ||
			!strings.Contains(m.Reason, "given up after 3 attempts") || !strings.Contains(m.Reason, "kmsd member recover a") {
			t.Errorf("given up, it shows %+v", m)
		}
		if _, alarms := r.causes(api.EventRecovery, "a"); alarms != 1 {
			t.Errorf("%d alarms, want one", alarms)
		}
		_ = r.Recover(t.Context(), "a") // fails, and is given up again
		if _, alarms := r.causes(api.EventRecovery, "a"); alarms != 2 || !r.member("a").GaveUp {
			t.Errorf("%d alarms after another attempt, want two", alarms)
		}
		h.set(func(h *hsm) { h.refusal = nil })
		if err := r.Recover(t.Context(), "a"); err != nil {
			t.Error(err)
		}
		if m := r.member("a"); m.GaveUp || m.State != api.MemberActive || m.Reason != "" {
			t.Errorf("back, it shows %+v", m)
		}
		h.set(func(h *hsm) { h.refusal, h.attempts = errors.New("no power"), nil })
		h.crash()
		elapse(time.Hour)
		if _, _, n := h.count(); n != 3 {
			t.Errorf("after the next loss there were %d attempts, want 3", n)
		}
	})
}

func TestW8_AnyNumberOfRecoveriesMakeOneAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) {
			connect := c.Members[0].Connect
			c.Members[0].Connect = func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
				elapse(time.Second)
				return connect(ctx)
			}
		}).start()
		h := r.hsms["a"]
		h.set(func(h *hsm) { h.attempts = nil })
		h.crash()
		elapse(time.Millisecond) // the automatic one is under way
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if err := r.Recover(t.Context(), "a"); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if _, _, n := h.count(); n != 1 {
			t.Errorf("%d attempts, want one", n)
		}
	})
}

func TestAfterTheLossOfAllTheFirstSuccessComesSoonAfterTheFirstReturn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, func(c *group.Config) { c.Recovery.Interval = 10 * time.Minute }).start()
		off := func(names ...string) {
			for _, n := range names {
				r.hsms[n].set(func(h *hsm) { h.refusal = errors.New("no power") })
				r.hsms[n].crash()
			}
		}
		off("a", "b")
		elapse(3 * time.Hour)
		for range 2 { // it may be just about to be made
			if next := r.member("a").NextRecovery; next != nil && time.Until(*next) < 10*time.Second {
				elapse(10 * time.Second)
			}
		}
		if next := r.member("a").NextRecovery; next == nil || time.Until(*next) < 10*time.Second {
			t.Fatalf("the next attempt is at %v; the test wants a long pause", next)
		}
		off("c") // which shortens it
		elapse(time.Minute)
		if next := r.member("a").NextRecovery; next == nil || time.Until(*next) > time.Second {
			t.Errorf("nobody serves, and the next attempt is at %v", next)
		}
		back := time.Now()
		r.hsms["b"].set(func(h *hsm) { h.refusal = nil })
		for {
			if _, err := r.do(); err == nil {
				break
			}
			elapse(10 * time.Millisecond)
		}
		if took := time.Since(back); took > time.Second {
			t.Errorf("the first success came %v after the return", took)
		}
	})
}

func TestAPermanentFailureIsNotTriedMoreOftenWhileNobodyServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a"}, nil)
		r.hsms["a"].refusal = &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRPINIncorrect, Permanent: true}
		r.start()
		elapse(10 * time.Minute)
		if _, _, n := r.hsms["a"].count(); n > 14 {
			t.Errorf("%d attempts with a wrong PIN in 10 minutes", n)
		}
		if _, alarms := r.causes(api.EventMember, "a"); alarms != 1 {
			t.Errorf("%d alarms, want one", alarms)
		}
	})
}

func TestATokenThatIsBusyWithItsFirstProbeIsWaitedFor(t *testing.T) {
	for _, c := range []struct {
		name string
		busy time.Duration
		want api.MemberState
	}{
		{"for some seconds", 5 * time.Second, api.MemberActive},
		{"for too long", time.Hour, api.MemberDown},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []string{"a", "b"}, func(c *group.Config) { c.Recovery.Manual = true })
				began := time.Now()
				r.hsms["a"].fault = func(pluginproto.Command) error {
					if time.Since(began) < c.busy {
						return &pluginproto.Error{Class: pluginproto.ClassBusy, CKR: 0x31, Op: "probing"}
					}
					return nil
				}
				r.start()
				elapse(40 * time.Second)
				r.wantState("a", c.want)
				if _, _, n := r.hsms["a"].count(); n != 1 {
					t.Errorf("%d attempts, want one", n)
				}
			})
		})
	}
}

func TestW43_StatusAnswersWhileEverythingHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b", "c", "d*"}, nil).start()
		for _, h := range r.hsms {
			h.freeze()
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() { _, _ = r.Do(ctx, encrypt) })
		}
		for name := range r.hsms {
			wg.Go(func() {
				elapse(5 * time.Second)
				_ = r.Recover(ctx, name)
			})
		}
		for range 300 {
			elapse(100 * time.Millisecond)
			began := time.Now()
			if s := r.Status(); len(s.Members) != 4 {
				t.Errorf("%d members", len(s.Members))
			}
			if took := time.Since(began); took > 10*time.Millisecond {
				t.Fatalf("status took %v", took)
			}
		}
		wg.Wait()
		for _, h := range r.hsms {
			h.recover()
		}
	})
}

func TestW27_AReturningPrimaryWaitsForTheKeyOperationUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		r.hsms["a"].set(func(h *hsm) { h.refusal = errors.New("no power") })
		r.hsms["a"].crash()
		elapse(time.Millisecond)
		release, err := r.Lease(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		by, err := r.OnPrimary(t.Context(), func(ctx context.Context, m group.Member) error {
			r.hsms["a"].set(func(h *hsm) { h.refusal = nil })
			elapse(5 * time.Second)
			r.wantState("a", api.MemberSyncing)
			return generate(pluginproto.AES256)(ctx, m)
		})
		if by != "b" || err != nil || r.Status().Primary != "b" {
			t.Errorf("made on %s with %v, and the primary is %s", by, err, r.Status().Primary)
		}
		release()
		elapse(time.Millisecond)
		if p := r.Status().Primary; p != "a" {
			t.Errorf("in step again, a is not the primary, but %s", p)
		}
	})
}

func TestReinitializeTriesAllWhoAreAwayButTheDrained(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b", "c", "d", "e"}, func(c *group.Config) { c.Recovery.Retries = 1 }).start()
		wrong := &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRPINIncorrect, Permanent: true}
		for name, why := range map[string]error{"b": errors.New("no power"), "c": wrong, "d": errors.New("no power")} {
			r.hsms[name].set(func(h *hsm) { h.refusal = why })
			r.hsms[name].crash()
		}
		if err := r.Drain(t.Context(), "e", false); err != nil {
			t.Fatal(err)
		}
		elapse(time.Hour)
		for _, name := range []string{"b", "c"} {
			r.hsms[name].set(func(h *hsm) { h.refusal = nil })
		}
		got := r.Reinitialize(t.Context())
		if len(got) != 3 || got["b"] != nil || got["c"] != nil || got["d"] == nil {
			t.Errorf("got %v", got)
		}
		for name, want := range map[string]api.MemberState{"a": "active", "b": "active", "c": "active", "d": "down", "e": "draining"} {
			r.wantState(name, want)
		}
	})
}

func TestReadmitComparesAMemberThatGoesOnServing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var looks []bool
		var fail error
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) {
			c.Admit = func(_ context.Context, m group.Member, last bool) (group.Admission, error) {
				if m.Name() != "a" {
					return group.Admission{}, nil
				}
				looks = append(looks, last)
				elapse(time.Second)
				return group.Admission{Barred: []pluginproto.KeyID{keyID(len(looks))}}, fail
			}
		}).start()
		elapse(time.Minute)
		r.wantState("a", api.MemberActive)
		looks = nil
		done := make(chan error, 1)
		go func() { done <- r.Readmit(t.Context(), "a") }()
		elapse(500 * time.Millisecond)
		r.wantState("a", api.MemberActive)
		if err := <-done; err != nil || fmt.Sprint(looks) != "[false true]" {
			t.Errorf("looked %v, with %v", looks, err)
		}
		a, err := r.Member("a")
		if err != nil {
			t.Fatal(err)
		}
		cmd := encrypt
		cmd.Key = keyID(2)
		if _, err := a.Do(t.Context(), cmd); !errors.Is(err, group.ErrBarred) {
			t.Errorf("a copy that was found wrong is used: %v", err)
		}
		fail = errors.New("the catalog is away")
		if err := r.Readmit(t.Context(), "a"); !errors.Is(err, fail) {
			t.Errorf("got %v", err)
		}
		r.wantState("a", api.MemberActive)
		fail = &pluginproto.Error{Class: pluginproto.ClassMember, Op: "comparing", Msg: "its keys are gone", Permanent: true}
		if err := r.Readmit(t.Context(), "a"); !errors.Is(err, fail) {
			t.Errorf("got %v", err)
		}
		elapse(5 * time.Second)
		r.wantState("a", api.MemberFailed)
		if err := r.Readmit(t.Context(), "a"); !errors.Is(err, group.ErrNotInStep) {
			t.Errorf("got %v", err)
		}
	})
}

func TestARoleChangesWhileTheMemberServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		r.slow(50 * time.Millisecond)
		stop := r.load(6)
		for i := range 20 {
			elapse(70 * time.Millisecond)
			if err := r.SetStandby("b", i%2 == 0, false); err != nil {
				t.Error(err)
			}
			r.wantGroup(api.GroupNormal)
		}
		stop()
		if err := r.SetStandby("b", true, false); err != nil {
			t.Error(err)
		}
		r.hsms["b"].crash() // and comes back as what it is now
		elapse(time.Second)
		if m := r.member("b"); m.State != api.MemberStandby || m.Role != api.RoleStandby {
			t.Errorf("it is %s, %s", m.State, m.Role)
		}
	})
}

func TestAMemberStaysDrainedWhateverHappensToItsDriver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		if err := r.Drain(t.Context(), "b", false); err != nil {
			t.Fatal(err)
		}
		r.hsms["b"].crash()
		elapse(time.Hour)
		if m := r.member("b"); m.State != api.MemberDraining || m.DriverPID != 0 || m.CKR != "CKR_TOKEN_NOT_PRESENT" || m.NextRecovery != nil {
			t.Errorf("it shows %+v", m)
		}
		if err := r.Recover(t.Context(), "b"); err != nil {
			t.Error(err)
		}
		r.wantGroup(api.GroupNormal)
	})
}

func TestAMemberThatBeginsDrainedIsConnectedWhenThatEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, func(c *group.Config) { c.Members[1].Drained = true }).start()
		elapse(time.Hour)
		if _, _, n := r.hsms["b"].count(); n != 0 || r.member("b").State != api.MemberDraining || !strings.Contains(r.member("b").Reason, "drained") {
			t.Errorf("%d attempts, and it shows %+v", n, r.member("b"))
		}
		r.wantGroup(api.GroupDegraded)
		if err := r.Recover(t.Context(), "b"); err != nil { // as Resume
			t.Error(err)
		}
		r.wantGroup(api.GroupNormal)
	})
}
