package group_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// TestWhateverHappensToTheMembers breaks members at random, all but one at a time
// at most, and checks what has to hold in every case.
func TestWhateverHappensToTheMembers(t *testing.T) {
	for seed := range uint64(10) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { chaos(t, rand.New(rand.NewPCG(seed, 1))) })
		})
	}
}

func chaos(t *testing.T, dice *rand.Rand) {
	r := newRig(t, []string{"a", "b", "c", "s*"}, func(c *group.Config) {
		c.Hedge = true
		c.Recovery.Interval = 5 * time.Second
	}).start()
	for _, h := range r.hsms {
		h.set(func(h *hsm) { h.delay = 20 * time.Millisecond })
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { r.press(stop) })
	}
	for range 20 {
		elapse(time.Duration(dice.IntN(3000)) * time.Millisecond)
		r.hsms[[]string{"a", "b", "c"}[dice.IntN(3)]].suffer(dice.IntN(6))
	}
	close(stop)
	wg.Wait()
	for _, h := range r.hsms {
		h.set(func(h *hsm) {
			if h.frozen != nil {
				close(h.frozen)
			}
			h.frozen, h.fault, h.refusal, h.delay = nil, nil, nil, 0
		})
	}
	elapse(time.Minute)
	r.wantGroup(api.GroupNormal)
	for _, m := range r.Status().Members {
		if m.InFlight != 0 || m.Reason != "" || m.CKR != "CKR_OK" {
			t.Errorf("at rest, the member shows %+v", m)
		}
	}
}

// press sends commands until stop is closed. The standby is always well, so every
// one of them has to succeed in time.
func (r *rig) press(stop <-chan struct{}) {
	const limit = 10 * time.Second
	for {
		select {
		case <-stop:
			return
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		began := time.Now()
		if _, err := r.Do(ctx, encrypt); err != nil {
			r.t.Errorf("a command failed after %v: %v", time.Since(began), err)
		}
		if d := time.Since(began); d > limit+50*time.Millisecond {
			r.t.Errorf("a command with a limit of %v took %v", limit, d)
		}
		cancel()
	}
}

// suffer changes what is wrong with an HSM.
func (h *hsm) suffer(what int) {
	var crash bool
	h.set(func(h *hsm) {
		switch what {
		case 0:
			crash = len(h.conns) > 0
		case 1:
			if h.frozen == nil {
				h.frozen = make(chan struct{})
			}
		case 2:
			if h.frozen != nil {
				close(h.frozen)
				h.frozen = nil
			}
		case 3:
			h.refusal = &pluginproto.Error{Class: pluginproto.ClassMember, Op: "connecting", Permanent: true}
			crash = len(h.conns) > 0
		case 4:
			var n atomic.Int64
			h.fault = func(pluginproto.Command) error { // every other time
				if n.Add(1)%2 == 0 {
					return nil
				}
				return &pluginproto.Error{Class: pluginproto.ClassBusy, CKR: 0x31, Op: "encrypting"}
			}
		default:
			h.fault, h.refusal = nil, nil
		}
	})
	if crash {
		h.crash()
	}
}
