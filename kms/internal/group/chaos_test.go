package group_test

import (
	"context"
	"encoding/binary"
	"errors"
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

// slack is by how much nothing may outlive its deadline.
const slack = 50 * time.Millisecond

// TestW25_WhateverHappensToTheMembersNoCommandFails breaks members at random, adds
// and removes some, and leaves one standby alone. What has to hold in every case: a
// command gets its own answer, it gets one as long as it has the time to look for
// the member that works, and nothing outlives its deadline.
func TestW25_WhateverHappensToTheMembersNoCommandFails(t *testing.T) {
	for seed := range uint64(12) {
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
	guest := newHSM("guest")
	guest.delay = 20 * time.Millisecond
	for _, h := range r.hsms {
		h.set(func(h *hsm) { h.delay = 20 * time.Millisecond })
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() { r.press(rand.New(rand.NewPCG(dice.Uint64(), uint64(i))), stop) })
		synctest.Wait() // for its dice
	}
	wg.Go(func() { r.makeKeys(rand.New(rand.NewPCG(1, 1)), stop) })
	for range 30 {
		elapse(time.Duration(dice.IntN(3000)) * time.Millisecond)
		if dice.IntN(4) == 0 {
			change := dice.IntN(6)
			wg.Go(func() { r.regroup(guest, change) })
			continue
		}
		r.hsms[three[dice.IntN(3)]].suffer(dice)
	}
	close(stop)
	wg.Wait()
	for _, h := range r.hsms {
		h.recover()
	}
	elapse(time.Minute)
	for _, name := range three {
		_ = r.Resume(t.Context(), name) // if it was drained
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
// one that has the time has to succeed.
func (r *rig) press(dice *rand.Rand, stop <-chan struct{}) {
	limits := []time.Duration{5 * time.Millisecond, 50 * time.Millisecond, 700 * time.Millisecond, 3 * time.Second, 10 * time.Second}
	for !closed(stop) {
		limit := limits[dice.IntN(len(limits))]
		cmd := encrypt
		cmd.IV = binary.BigEndian.AppendUint64(make([]byte, 4), dice.Uint64())
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		began := time.Now()
		res, err := r.Do(ctx, cmd)
		took := time.Since(began)
		cancel()
		switch {
		case took > limit+slack:
			r.t.Errorf("a command with a limit of %v took %v", limit, took)
		case err == nil && string(res.IV) != string(cmd.IV):
			r.t.Error("a command got another one's answer")
		case err != nil && (limit >= 10*time.Second || !errors.Is(err, context.DeadlineExceeded)):
			r.t.Errorf("a command with a limit of %v failed after %v: %v", limit, took, err)
		}
	}
}

// makeKeys makes and destroys keys until stop is closed. That may fail, but in time,
// and whoever has the lease gives it back.
func (r *rig) makeKeys(dice *rand.Rand, stop <-chan struct{}) {
	for n := 0; !closed(stop); n++ {
		limit := time.Duration(10+dice.IntN(5000)) * time.Millisecond
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		began := time.Now()
		if release, err := r.Lease(ctx); err == nil {
			_, _ = r.OnPrimary(ctx, func(ctx context.Context, m group.Member) error {
				_, err := m.Generate(ctx, pluginproto.KeySpec{ID: keyID(n)})
				return err
			})
			r.OnEach(ctx, nil, func(ctx context.Context, m group.Member) error { return m.Destroy(ctx, keyID(n)) })
			release()
		}
		if took := time.Since(began); took > limit+slack {
			r.t.Errorf("a key operation with a limit of %v took %v", limit, took)
		}
		cancel()
		elapse(time.Duration(dice.IntN(300)) * time.Millisecond)
	}
}

// regroup changes who is in the group. Faults may get in the way of that.
func (r *rig) regroup(guest *hsm, change int) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	switch change {
	case 0, 1:
		_ = r.Add(ctx, group.MemberConfig{Name: "guest", Driver: "fake", Connect: guest.connect})
	case 2:
		_ = r.Remove(ctx, "guest", false)
	case 3:
		_ = r.Drain(ctx, "c", false)
	case 4:
		_ = r.Resume(ctx, "c")
	case 5:
		_ = r.Readmit(ctx, "b")
	}
}

// suffer changes what is wrong with an HSM.
func (h *hsm) suffer(dice *rand.Rand) {
	what := dice.IntN(10)
	some := int64(1 + dice.IntN(10)) // commands
	var crash bool
	h.set(func(h *hsm) {
		switch what {
		case 0:
			crash = len(h.conns) > 0
		case 1, 2:
			if h.frozen == nil {
				h.frozen = make(chan struct{})
			}
		case 3:
			if h.frozen != nil {
				close(h.frozen)
				h.frozen = nil
			}
		case 4:
			h.refusal = &pluginproto.Error{Class: pluginproto.ClassMember, Op: "connecting", Permanent: true}
			crash = len(h.conns) > 0
		case 5:
			h.fault = someTimes(1<<40, 2, &pluginproto.Error{Class: pluginproto.ClassBusy, CKR: 0x31, Op: "encrypting"})
		case 6:
			h.fault = someTimes(some, 1, errDevice())
		case 7: // one HSM alone: of two that give no sense an answer is returned
			if h.name == "a" {
				h.fault = someTimes(some, 1, &pluginproto.Error{Class: pluginproto.ClassUnknown, CKR: pluginproto.CKRGeneralError})
			}
		case 8:
			h.delay = time.Duration(1+some*40) * time.Millisecond
			h.keyDelay = time.Duration(some) * time.Second
		default:
			h.fault, h.refusal, h.delay, h.keyDelay = nil, nil, 20*time.Millisecond, 0
		}
	})
	if crash {
		h.crash()
	}
}

// someTimes makes a fault that happens to every nth of so many commands.
func someTimes(commands, nth int64, err error) func(pluginproto.Command) error {
	var n atomic.Int64
	return func(pluginproto.Command) error {
		if i := n.Add(1); i > commands || i%nth != 0 {
			return nil
		}
		return err
	}
}

// recover makes an HSM well again.
func (h *hsm) recover() {
	h.set(func(h *hsm) {
		if h.frozen != nil {
			close(h.frozen)
		}
		h.frozen, h.fault, h.refusal, h.delay, h.keyDelay = nil, nil, nil, 0, 0
	})
}
