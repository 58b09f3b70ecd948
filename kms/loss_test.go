package kms_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
)

// loseAll takes all members away, for good or until they come.
func (r *rig) loseAll() {
	for _, h := range r.hsms {
		h.leave()
	}
}

// hangAll makes every call of every driver hang, also of those yet to be started.
func (r *rig) hangAll() {
	for _, h := range r.hsms {
		hang := memdriver.Fault{Hang: make(chan struct{})}
		h.driver().Script(hang)
		h.mu.Lock()
		h.faults = append(h.faults, hang)
		h.mu.Unlock()
	}
}

func wantCKR(t *testing.T, err error, ckr string) {
	t.Helper()
	if e, ok := errors.AsType[*api.Error](err); !ok || e.CKR != ckr {
		t.Errorf("error %v has the CKR %q, want %s", err, e.CKR, ckr)
	}
}

// noticed is how long a caller may wait for a member that was lost this moment, and
// comes back at once more often than not.
const noticed = 2*time.Second + 50*time.Millisecond

func TestAllCallersLearnOfALostGroupAtOnce(t *testing.T) { // W2, W17
	for _, c := range []struct {
		name   string
		lose   func(*rig)
		within time.Duration
	}{
		{"all drivers die", (*rig).loseAll, noticed},
		{"all tokens hang", (*rig).hangAll, 2 * noticed}, // it is silence that is noticed first
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3).mustStart()
				defer r.stop()
				r.create("shop")
				wrapped := r.wrap("shop")
				const callers = 200
				var wg sync.WaitGroup
				var mu sync.Mutex
				var first, last time.Time
				for range callers {
					wg.Go(func() {
						for {
							_, err := r.Unwrap(t.Context(), "shop", wrapped, []byte("aad"))
							if err == nil {
								<-time.After(10 * time.Millisecond)
								continue
							}
							if !errors.Is(err, kms.ErrGroupLost) {
								t.Errorf("a caller got %v", err)
							}
							mu.Lock()
							defer mu.Unlock()
							last = time.Now()
							if first.IsZero() {
								first = last
							}
							return
						}
					})
				}
				<-time.After(100 * time.Millisecond)
				lost := time.Now()
				c.lose(r)
				wg.Wait()
				t.Logf("%d callers: the first knew after %v, the last after %v", callers, first.Sub(lost), last.Sub(lost))
				if took := last.Sub(lost); took > c.within {
					t.Errorf("the last of %d callers knew after %v", callers, took)
				}

				<-time.After(time.Minute)
				began := time.Now()
				for range 100 {
					_, err := r.Unwrap(t.Context(), "shop", wrapped, []byte("aad"))
					wantError(t, err, kms.ErrGroupLost, "no member of the group can serve")
					wantCKR(t, err, "CKR_TOKEN_NOT_PRESENT")
				}
				if took := time.Since(began); took > 0 {
					t.Errorf("100 later calls took %v, want no wait at all", took)
				}
			})
		})
	}
}

func TestTheFirstReportOfALostGroupIsADeviceError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.create("shop")
		r.loseAll()
		<-time.After(time.Minute)
		for _, want := range []string{"CKR_DEVICE_ERROR", "CKR_TOKEN_NOT_PRESENT", "CKR_TOKEN_NOT_PRESENT"} {
			_, err := r.Wrap(t.Context(), "shop", []byte("data"), nil)
			wantError(t, err, kms.ErrGroupLost, "")
			wantCKR(t, err, want)
		}
	})
}

func TestALostGroupIsBackWithinASecondOfItsFirstMember(t *testing.T) { // W3, W5, W14, W16
	for _, away := range []time.Duration{time.Second, 10 * time.Second, time.Minute, time.Hour} {
		t.Run(fmt.Sprintf("after %v", away), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3).mustStart()
				defer r.stop()
				r.create("shop")
				wrapped := r.wrap("shop")
				r.loseAll()
				<-time.After(away)
				r.hsms[1].come()
				back := time.Now()
				r.awaitState(api.GroupSole) // nobody calls it: status is from memory
				if took := time.Since(back); took > time.Second {
					t.Errorf("the first member served after %v", took)
				}
				r.wantUnwrap("shop", wrapped) // made before the loss, and as good as ever
				r.wantUnwrap("shop", r.wrap("shop"))
				r.hsms[0].come()
				r.hsms[2].come()
				r.wantStates(active, active, active)
				r.wantConsistent()
			})
		})
	}
}

func (r *rig) awaitState(want api.GroupState) {
	r.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range 6000 {
		if r.Status().Groups[0].State == want {
			return
		}
		<-tick.C
	}
	r.t.Fatalf("the group is %s, want %s", r.Status().Groups[0].State, want)
}

func TestTheCatalogJudgesWhatTheFirstMemberThatReturnsHolds(t *testing.T) { // W19
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3)
		r.group.MinCopies = 1
		r.mustStart()
		defer r.stop()
		r.create("old")
		r.create("doomed")
		old, doomed := r.wrap("old"), r.wrap("doomed")
		r.hsms[2].leave()
		r.wantStates(active, active, down)
		r.create("new") // hsm-c misses this, and the next
		fresh := r.wrap("new")
		if _, err := r.Destroy(t.Context(), "doomed", 0); err != nil {
			t.Fatal(err)
		}
		r.loseAll()
		<-time.After(time.Minute)

		r.hsms[2].come() // of all members the one that knows least
		r.wantStates(down, down, active)
		r.wantUnwrap("old", old)
		for range 10 {
			_, err := r.Unwrap(t.Context(), "new", fresh, []byte("aad"))
			wantError(t, err, kms.ErrUnavailable, "") // never "not found"
			_, err = r.Wrap(t.Context(), "new", []byte("data"), nil)
			wantError(t, err, kms.ErrUnavailable, "")
			_, err = r.Unwrap(t.Context(), "doomed", doomed, []byte("aad"))
			wantError(t, err, kms.ErrState, "")
		}
		if n := len(r.hsms[2].token.Keys()); n != 1 {
			t.Errorf("hsm-c holds %d keys, want the old one: the destroyed one is gone, the new one not there yet", n)
		}
		if m := r.Status().Groups[0].Members[2]; m.Missing != 1 {
			t.Errorf("status says that hsm-c lacks %d", m.Missing)
		}
		r.create("meanwhile")

		r.hsms[0].come()
		r.wantStates(active, down, active)
		r.wantUnwrap("new", fresh)
		r.hsms[1].come()
		r.wantStates(active, active, active)
		r.wantConsistent()
	})
}

func TestAnyNumberOfReinitializationsIsOneAttempt(t *testing.T) { // W8, W16
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3)
		r.group.Recovery = kms.RecoveryConfig{Manual: true}
		r.mustStart()
		defer r.stop()
		r.create("shop")
		wrapped := r.wrap("shop")
		r.loseAll()
		r.wantStates(down, down, down)
		pids := make(map[string]int)
		for _, h := range r.hsms {
			h.come()
			pids[h.name] = h.driver().PID()
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if g, err := r.Reinitialize(t.Context(), ""); err != nil || g.State != api.GroupNormal {
					t.Errorf("the group is %s, %v", g.State, err)
				}
			})
			wg.Go(func() {
				_, err := r.Unwrap(t.Context(), "shop", wrapped, []byte("aad"))
				if err != nil && !errors.Is(err, kms.ErrGroupLost) {
					t.Errorf("unwrapping meanwhile: %v", err)
				}
			})
		}
		wg.Wait()
		for _, h := range r.hsms {
			if n := h.driver().PID() - pids[h.name]; n != 1 {
				t.Errorf("%s was opened %d times", h.name, n)
			}
		}
		r.wantUnwrap("shop", wrapped)
	})
}

// What was abandoned on a member before the loss has no effect after it.
func TestNothingAbandonedComesToLifeAfterALoss(t *testing.T) { // W15
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.create("shop")
		thaw := make(chan struct{})
		for _, h := range r.hsms { // destruction hangs on both
			h.driver().Script(memdriver.Fault{Call: memdriver.CallDestroy, Hang: thaw})
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.Destroy(ctx, "shop", 0); err != nil && !errors.Is(err, kms.ErrDeadline) {
			t.Fatal(err)
		}
		r.loseAll()
		r.wantStates(down, down)
		for _, h := range r.hsms {
			h.come()
		}
		r.wantStates(active, active)
		r.create("till")
		wrapped := r.wrap("till")
		close(thaw)
		<-time.After(time.Minute)
		r.wantUnwrap("till", wrapped)
		r.wantConsistent()
	})
}

func TestStatusNeverWaitsForAMember(t *testing.T) { // W39, W43
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		r.hangAll()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				for ctx.Err() == nil {
					switch i {
					case 0:
						_, _ = r.CreateMasterKey(ctx, "till", kms.KeyOptions{})
					case 1:
						_, _ = r.Sync(ctx, "", api.SyncOptions{Adopt: true})
					case 2:
						_, _ = r.Check(ctx, "")
					case 3:
						_, _ = r.Reinitialize(ctx, "")
					case 4:
						_, _ = r.Verify(ctx, "shop")
					default:
						_, _ = r.Wrap(ctx, "shop", []byte("data"), nil)
					}
					<-time.After(time.Second)
				}
			})
		}
		for ctx.Err() == nil {
			began := time.Now()
			s := r.Status()
			if took := time.Since(began); took > 0 { // in a bubble, any wait takes time
				t.Errorf("status took %v", took)
			}
			if len(s.Groups[0].Members) != 3 {
				t.Errorf("status has %d members", len(s.Groups[0].Members))
			}
			<-time.After(100 * time.Millisecond)
		}
		wg.Wait()
	})
}
