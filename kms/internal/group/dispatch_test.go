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

var three = []string{"a", "b", "c"}

func TestCommandsAreSharedAmongEqualMembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		r.wantGroup(api.GroupNormal)
		by := map[string]int{}
		for range 300 {
			by[r.mustDo()]++
		}
		for _, name := range three {
			if by[name] != 100 {
				t.Errorf("member %s served %d of 300 commands, want 100", name, by[name])
			}
		}
	})
}

func TestABusyMemberGetsFewerCommands(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"slow", "fast"}, nil).start()
		r.hsms["slow"].set(func(h *hsm) { h.delay = 10 * time.Millisecond })
		r.hsms["fast"].set(func(h *hsm) { h.delay = time.Millisecond })
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 100 {
					if _, err := r.do(); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		slow, _, _ := r.hsms["slow"].count()
		fast, _, _ := r.hsms["fast"].count()
		if fast < 4*slow {
			t.Errorf("the fast member served %d commands, the slow one %d; want at least 4 times as many", fast, slow)
		}
	})
}

func TestFailoverUnderLoadLosesNoCommand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		for _, h := range r.hsms {
			h.set(func(h *hsm) { h.delay = 5 * time.Millisecond })
		}
		stop := make(chan struct{})
		var wg sync.WaitGroup
		var done, slowest atomic.Int64
		for range 8 {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					began := time.Now()
					if _, err := r.do(); err != nil {
						t.Errorf("a command failed: %v", err)
					}
					done.Add(1)
					slowest.Store(max(slowest.Load(), int64(time.Since(began))))
				}
			})
		}
		for i := range 12 {
			elapse(time.Second)
			r.hsms[three[i%3]].crash()
		}
		elapse(5 * time.Second)
		close(stop)
		wg.Wait()
		if d := time.Duration(slowest.Load()); d > 250*time.Millisecond {
			t.Errorf("the slowest of %d commands took %v, want at most 250ms", done.Load(), d)
		}
		r.wantGroup(api.GroupNormal)
	})
}

func TestAThousandFailingCommandsMakeOneDrop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil).start()
		r.hsms["b"].set(func(h *hsm) { h.delay = time.Second })
		gate := make(chan struct{})
		r.hsms["a"].set(func(h *hsm) {
			h.delay = time.Second
			h.refusal = errors.New("no power")
			h.fault = func(pluginproto.Command) error { <-gate; return errDevice() }
		})
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() {
				if by, err := r.do(); err != nil || by != "b" {
					t.Errorf("answered by %q with %v, want b", by, err)
				}
			})
		}
		elapse(1100 * time.Millisecond)
		close(gate)
		wg.Wait()
		synctest.Wait()
		if n := r.told("a", api.MemberActive, api.MemberDown); n != 1 {
			t.Errorf("the member was lost %d times, want once", n)
		}
	})
}

func TestWhatACommandDoesWithEachClass(t *testing.T) {
	failing := func(class pluginproto.Class, ckr uint) error {
		return &pluginproto.Error{Class: class, CKR: ckr, Op: "encrypting"}
	}
	for _, c := range []struct {
		name  string
		fault error
		want  string // answered by, or part of the error
		state api.MemberState
	}{
		{"a member fault moves the command and drops the member", failing(pluginproto.ClassMember, pluginproto.CKRDeviceError), "b", api.MemberDown},
		{"a busy member is left alone and the command moved", failing(pluginproto.ClassBusy, 0x31), "b", api.MemberActive},
		{"an answer nobody understands is asked for once more elsewhere", failing(pluginproto.ClassUnknown, pluginproto.CKRGeneralError), "b", api.MemberActive},
		{"a fault that has no class is unknown", errors.New("what?"), "b", api.MemberActive},
		{"a caller's mistake is returned", failing(pluginproto.ClassCaller, pluginproto.CKREncryptedDataInvalid), "member a: encrypting: CKR_", api.MemberActive},
		{"a missing key is returned with the member's name", failing(pluginproto.ClassNotFound, 0), "member a: encrypting", api.MemberActive},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []string{"a", "b"}, func(c *group.Config) { c.Recovery.Manual = true }).start()
				r.hsms["a"].set(func(h *hsm) { h.fault = func(pluginproto.Command) error { return c.fault } })
				by, err := r.do()
				if err != nil {
					by = err.Error()
					if !errors.Is(err, c.fault) {
						t.Errorf("%v does not lead to the driver's error", err)
					}
				}
				if !strings.HasPrefix(by, c.want) {
					t.Errorf("got %q, want %q", by, c.want)
				}
				r.wantState("a", c.state)
			})
		})
	}
}

func TestAnUnknownAnswerOnTwoMembersIsReturned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		var asked atomic.Int32
		for _, h := range r.hsms {
			h.set(func(h *hsm) {
				h.fault = func(pluginproto.Command) error {
					asked.Add(1)
					return &pluginproto.Error{Class: pluginproto.ClassUnknown, CKR: pluginproto.CKRGeneralError}
				}
			})
		}
		_, err := r.do()
		var me *group.MemberError
		if !errors.As(err, &me) || pluginproto.ClassOf(err) != pluginproto.ClassUnknown || asked.Load() != 2 {
			t.Errorf("got %v after %d attempts, want an unknown member error after 2", err, asked.Load())
		}
	})
}

func TestAllBusyMembersAreAskedAgainUntilTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil).start()
		busy := &pluginproto.Error{Class: pluginproto.ClassBusy, CKR: 0xB1, Op: "opening a session"}
		for _, h := range r.hsms {
			h.set(func(h *hsm) { h.fault = func(pluginproto.Command) error { return busy } })
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		_, err := r.Do(ctx, encrypt)
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, busy) {
			t.Errorf("got %v, want the deadline and what came before it", err)
		}
		if d := time.Since(began); d > time.Second+50*time.Millisecond {
			t.Errorf("the command outlived its deadline: %v", d)
		}
		go func() {
			elapse(300 * time.Millisecond)
			r.hsms["b"].set(func(h *hsm) { h.fault = nil })
		}()
		if by := r.mustDo(); by != "b" {
			t.Errorf("answered by %s, want b, which has room again", by)
		}
	})
}

func TestAFrozenMembersCommandsMoveAndItComesBackWhenItAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		r.hsms["a"].freeze()
		var wg sync.WaitGroup
		for range 30 {
			wg.Go(func() {
				began := time.Now()
				if by, err := r.do(); err != nil || by == "a" {
					t.Errorf("answered by %q with %v", by, err)
				}
				if d := time.Since(began); d > 2500*time.Millisecond {
					t.Errorf("a command waited %v for the frozen member", d)
				}
			})
		}
		wg.Wait()
		r.wantState("a", api.MemberProbing)
		r.wantGroup(api.GroupDegraded)
		if m := r.member("a"); m.Reason == "" || m.CKR != "CKR_DEVICE_ERROR" || m.InFlight == 0 {
			t.Errorf("a silent member shows %+v, want a reason, a CKR and what it owes", m)
		}
		for range 20 {
			if r.mustDo() == "a" {
				t.Error("the silent member got a new command")
			}
		}
		elapse(3 * time.Second)
		r.hsms["a"].thaw()
		elapse(time.Second)
		r.wantState("a", api.MemberActive)
		want := []string{"probing", "syncing", "active", "probing", "syncing", "active"}
		if got := r.path("a"); !slices.Equal(got, want) {
			t.Errorf("the member went through %v, want %v", got, want)
		}
		if _, n, _ := r.hsms["a"].count(); n != 1 {
			t.Errorf("the driver was started %d times, want once", n)
		}
		if m := r.member("a"); m.InFlight != 0 || m.CKR != "CKR_OK" || m.Reason != "" {
			t.Errorf("a member that is back shows %+v", m)
		}
	})
}

func TestAMemberSilentForTheCommandTimeoutIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil).start()
		r.hsms["a"].freeze()
		elapse(10 * time.Second)
		r.wantState("a", api.MemberProbing) // an idle member is probed, so this needs no command
		r.hsms["a"].set(func(h *hsm) { h.refusal = errors.New("still frozen") })
		elapse(13 * time.Second)
		m := r.member("a")
		if r.told("a", api.MemberProbing, api.MemberDown) == 0 || m.DriverPID != 0 {
			t.Errorf("after 23 s of silence the member is %s with process %d, want it dropped", m.State, m.DriverPID)
		}
		r.hsms["a"].set(func(h *hsm) { h.frozen, h.refusal = nil, nil })
		elapse(time.Minute)
		r.wantState("a", api.MemberActive)
		if _, n, _ := r.hsms["a"].count(); n != 2 {
			t.Errorf("the driver was started %d times, want twice", n)
		}
	})
}

func TestAMemberThatSendsHeartbeatsIsNotDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil).start()
		r.hsms["a"].set(func(h *hsm) { h.beats = true })
		r.hsms["a"].freeze()
		elapse(5 * time.Minute)
		r.wantState("a", api.MemberProbing)
		r.hsms["a"].thaw()
		elapse(time.Second)
		r.wantState("a", api.MemberActive)
		if _, n, _ := r.hsms["a"].count(); n != 1 {
			t.Errorf("the driver was started %d times, want once", n)
		}
	})
}

func TestASlowCommandIsHedgedWithinTheBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) { c.Hedge = true }).start()
		r.hsms["a"].freeze()
		for range 5 {
			began := time.Now()
			if by := r.mustDo(); by != "b" {
				t.Errorf("answered by %s", by)
			}
			if d := time.Since(began); d > 6*time.Millisecond {
				t.Errorf("the command took %v, want about 5ms", d)
			}
		}
		r.wantState("a", api.MemberActive) // 2 s are not over yet
		r.hsms["a"].thaw()

		for _, h := range r.hsms { // now everything is slow
			h.set(func(h *hsm) { h.delay, h.served = 20*time.Millisecond, 0 })
		}
		const n = 1000
		for range n {
			r.mustDo()
		}
		elapse(time.Second)
		a, _, _ := r.hsms["a"].count()
		b, _, _ := r.hsms["b"].count()
		if extra := a + b - n; extra > n/20+10 {
			t.Errorf("%d extra commands for %d, want at most 5 %% and a reserve of 10", extra, n)
		}
		if m := r.member("a"); m.InFlight != 0 {
			t.Errorf("%d commands in flight at the end", m.InFlight)
		}
	})
}

func TestNoCommandOutlivesItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, func(c *group.Config) { c.Hedge = true }).start()
		for _, h := range r.hsms {
			h.freeze()
		}
		for i := range 40 {
			limit := time.Duration(i+1) * 100 * time.Millisecond
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), limit)
				defer cancel()
				began := time.Now()
				_, err := r.Do(ctx, encrypt)
				if err == nil {
					t.Error("a frozen group answered")
				}
				if d := time.Since(began); d > limit+50*time.Millisecond {
					t.Errorf("a command with %v took %v", limit, d)
				}
			}()
		}
		elapse(5 * time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := r.Do(ctx, encrypt); !errors.Is(err, context.Canceled) {
			t.Errorf("with a context that has ended: %v", err)
		}
	})
}

func TestWhenEveryMemberIsSilentCommandsFailSoonAndServeAgainAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil).start()
		r.hsms["a"].freeze()
		r.hsms["b"].freeze()
		elapse(6 * time.Second)
		r.wantGroup(api.GroupLost)
		began := time.Now()
		_, err := r.do()
		if !errors.Is(err, group.ErrLost) || time.Since(began) > 2100*time.Millisecond {
			t.Errorf("got %v after %v, want the loss within 2 s", err, time.Since(began))
		}
		go func() {
			elapse(time.Second)
			r.hsms["b"].thaw()
		}()
		if by := r.mustDo(); by != "b" {
			t.Errorf("answered by %s, want b", by)
		}
		r.hsms["a"].thaw()
	})
}

func TestALostGroupFailsFastWithTheCodesOfLuna(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil).start()
		for _, h := range r.hsms {
			h.set(func(h *hsm) { h.refusal = errors.New("no route to the HSM") })
			h.crash()
		}
		elapse(3 * time.Second) // longer than anybody waits for a restart
		r.wantGroup(api.GroupLost)
		for i, want := range []uint{pluginproto.CKRDeviceError, pluginproto.CKRTokenNotPresent, pluginproto.CKRTokenNotPresent} {
			began := time.Now()
			_, err := r.do()
			if !errors.Is(err, group.ErrLost) || pluginproto.CKROf(err) != want {
				t.Errorf("call %d got %v, want the loss with %s", i, err, pluginproto.CKRName(want))
			}
			if time.Since(began) > 0 {
				t.Errorf("call %d waited %v", i, time.Since(began))
			}
		}
		if p := r.Status().Primary; p != "" {
			t.Errorf("a lost group has the primary %q", p)
		}
		for _, h := range r.hsms {
			h.set(func(h *hsm) { h.refusal = nil })
		}
		elapse(10 * time.Second)
		r.wantGroup(api.GroupNormal)
		r.mustDo()
	})
}

func TestACommandOnALostMemberWaitsForItsRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a"}, nil).start()
		r.hsms["a"].set(func(h *hsm) { h.delay = 100 * time.Millisecond })
		go func() {
			elapse(50 * time.Millisecond)
			r.hsms["a"].crash()
		}()
		if by := r.mustDo(); by != "a" {
			t.Errorf("answered by %q", by)
		}
	})
}

func TestACommandThatCrashesEveryDriverIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		var asked atomic.Int32
		for _, h := range r.hsms {
			h.set(func(h *hsm) {
				h.fault = func(cmd pluginproto.Command) error {
					if cmd.Op == pluginproto.OpProbe {
						return nil
					}
					asked.Add(1)
					h.crash()
					return errDevice()
				}
			})
		}
		_, err := r.do()
		if !errors.Is(err, group.ErrLost) || pluginproto.CKROf(err) != pluginproto.CKRDeviceError {
			t.Errorf("got %v", err)
		}
		if n := asked.Load(); n > 6 {
			t.Errorf("the command crashed %d drivers, want at most two rounds", n)
		}
	})
}

func TestClosedGroupRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a"}, nil).start()
		r.Close()
		if _, err := r.do(); !errors.Is(err, group.ErrClosed) {
			t.Errorf("got %v", err)
		}
		if err := r.Recover(t.Context(), "a"); !errors.Is(err, group.ErrClosed) {
			t.Errorf("got %v", err)
		}
	})
}

func TestTheCommandsBytesAreTheGroupsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a"}, nil).start()
		seen := make(chan string, 1)
		r.hsms["a"].set(func(h *hsm) {
			h.delay = time.Second
			h.fault = func(cmd pluginproto.Command) error {
				if cmd.Op == pluginproto.OpEncrypt {
					seen <- fmt.Sprintf("%s %s %d", cmd.Input, cmd.AAD, len(cmd.IV))
				}
				return nil
			}
		})
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		ctx, stop := context.WithCancel(context.WithoutCancel(ctx)) // no deadline for the driver to see
		time.AfterFunc(500*time.Millisecond, stop)
		input := []byte("plaintext")
		_, err := r.Do(ctx, pluginproto.Command{Op: pluginproto.OpEncrypt, Input: input, IV: make([]byte, 12), AAD: []byte("aad")})
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
		clear(input) // as a caller does, while the driver is still at it
		if got := <-seen; got != "plaintext aad 12" {
			t.Errorf("the driver saw %q", got)
		}
	})
}
