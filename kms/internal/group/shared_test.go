package group_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// TestW2_EveryCallerLearnsOfTheLossOfAllMembersAtOnce: with a Luna client it takes up
// to 40 s until the last thread has found out for itself.
func TestW2_EveryCallerLearnsOfTheLossOfAllMembersAtOnce(t *testing.T) {
	for _, c := range []struct {
		name   string
		befall func(*hsm)
		want   time.Duration // at most
	}{
		{"the drivers die", (*hsm).crash, 2 * time.Second},
		{"the HSMs freeze", (*hsm).freeze, 4500 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, three, hedged).start()
				for _, h := range r.hsms {
					h.set(func(h *hsm) { h.delay = 10 * time.Millisecond })
				}
				var (
					wg          sync.WaitGroup
					mu          sync.Mutex // guards first, last
					first, last time.Time
				)
				for range 200 {
					wg.Go(func() {
						for {
							if _, err := r.do(); err != nil {
								if !errors.Is(err, group.ErrLost) {
									t.Errorf("got %v, want the loss", err)
								}
								break
							}
						}
						mu.Lock()
						defer mu.Unlock()
						if first.IsZero() {
							first = time.Now()
						}
						last = time.Now()
					})
				}
				elapse(100 * time.Millisecond)
				began := time.Now()
				for _, h := range r.hsms {
					h.set(func(h *hsm) { h.refusal = errors.New("no power") })
					c.befall(h)
				}
				wg.Wait()
				if took := last.Sub(began); took > c.want {
					t.Errorf("the last of 200 callers learned of it after %v, want %v at most", took, c.want)
				}
				if spread := last.Sub(first); spread > 50*time.Millisecond {
					t.Errorf("the last of 200 callers learned of it %v after the first", spread)
				}
				for range 10 { // whoever comes later does not wait for his own proof
					began := time.Now()
					if _, err := r.do(); !errors.Is(err, group.ErrLost) || time.Since(began) > 2*time.Second {
						t.Errorf("got %v after %v", err, time.Since(began))
					}
				}
			})
		})
	}
}

// TestW21_WhatAnybodyDoesOnAMemberCountsForEverybody: Luna clients do not know of each
// other's load.
func TestW21_WhatAnybodyDoesOnAMemberCountsForEverybody(t *testing.T) {
	for _, c := range []struct {
		name string
		busy func(*testing.T, *rig) // makes a busy and b and c not
	}{
		{"a key operation", func(t *testing.T, r *rig) {
			r.hsms["a"].set(func(h *hsm) { h.keyDelay = time.Second })
			go func() { _, _ = r.OnPrimary(context.Background(), generate(pluginproto.AES256)) }()
		}},
		{"a member asked by name", func(t *testing.T, r *rig) {
			m, err := r.Member("a")
			if err != nil {
				t.Fatal(err)
			}
			for range 3 {
				go func() { _, _ = m.Do(context.Background(), encrypt) }()
			}
		}},
		{"a command whose caller has left", func(t *testing.T, r *rig) {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(time.Millisecond, cancel)
			if _, err := r.Do(ctx, sign); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		}},
		{"another caller's command", func(t *testing.T, r *rig) {
			go func() { _, _ = r.Do(context.Background(), sign) }()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, three, nil).start()
				for _, h := range r.hsms {
					h.set(func(h *hsm) { h.delay = 100 * time.Millisecond })
				}
				c.busy(t, r)
				synctest.Wait()
				before := r.member("a").InFlight
				for range 6 {
					go func() { _, _ = r.do() }()
					synctest.Wait()
				}
				a, b, c := r.member("a").InFlight-before, r.member("b").InFlight, r.member("c").InFlight
				if a != 0 || b != 3 || c != 3 {
					t.Errorf("of six commands %d, %d and %d went to the busy and the idle members, want 0, 3 and 3", a, b, c)
				}
				elapse(5 * time.Second)
			})
		})
	}
}
