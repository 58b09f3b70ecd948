package group_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

var sign = pluginproto.Command{Op: pluginproto.OpSign, Mech: pluginproto.RSAPSS, Hash: pluginproto.SHA256, Input: make([]byte, 32)}

// signatures has callers sign for a while and returns the p99 of the time they took.
// When pair is set, the first member makes an RSA-4096 pair meanwhile.
func signatures(t *testing.T, change func(*group.Config), pair bool) (p99 time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, change).start()
		for _, h := range r.hsms { // as fast as SoftHSM with RSA-4096, one call at a time
			h.set(func(h *hsm) {
				h.turn, h.keyDelay = make(chan struct{}, 1), 2*time.Second
				h.work = func() time.Duration { return 4 * time.Millisecond }
			})
		}
		var (
			mu   sync.Mutex // guards took
			took []time.Duration
			wg   sync.WaitGroup
			stop = make(chan struct{})
		)
		for range 64 {
			wg.Go(func() {
				for !closed(stop) {
					began := time.Now()
					if _, err := r.Do(context.Background(), sign); err != nil {
						t.Error(err)
					}
					mu.Lock()
					took = append(took, time.Since(began))
					mu.Unlock()
				}
			})
		}
		elapse(100 * time.Millisecond)
		if pair {
			if _, err := r.OnPrimary(t.Context(), func(ctx context.Context, m group.Member) error {
				_, err := m.Generate(ctx, pluginproto.KeySpec{ID: keyID(1), Type: pluginproto.RSA4096})
				return err
			}); err != nil {
				t.Error(err)
			}
		} else {
			elapse(2 * time.Second)
		}
		close(stop)
		wg.Wait()
		slices.Sort(took)
		p99 = took[len(took)*99/100]
	})
	return p99
}

// TestW22_ASignatureDoesNotQueueBehindTheGenerationOfAKey: with a Luna client, which
// counts commands, it does.
func TestW22_ASignatureDoesNotQueueBehindTheGenerationOfAKey(t *testing.T) {
	for _, hedge := range []bool{false, true} {
		t.Run(fmt.Sprintf("hedging %v", hedge), func(t *testing.T) {
			weighted := func(c *group.Config) { c.Hedge = hedge }
			plain := func(c *group.Config) { c.Hedge, c.PlainCount = hedge, true }
			quiet, during := signatures(t, weighted, false), signatures(t, weighted, true)
			if during > 2*quiet {
				t.Errorf("by cost, the p99 of signatures is %v during a generation and %v without one, want at most twice that", during, quiet)
			}
			plainQuiet, plainDuring := signatures(t, plain, false), signatures(t, plain, true)
			if !hedge && plainDuring < 10*plainQuiet {
				t.Errorf("by plain count, the p99 is %v during a generation and %v without one; the load should show the stall", plainDuring, plainQuiet)
			}
			t.Logf("p99 by cost: %v without, %v during; by plain count: %v without, %v during", quiet, during, plainQuiet, plainDuring)
		})
	}
}

// TestW23_LoadIsWhatCommandsCostNotHowManyThereAre: a member with one signature gets
// the next commands when the others have that many more.
func TestW23_LoadIsWhatCommandsCostNotHowManyThereAre(t *testing.T) {
	for _, c := range []struct {
		name  string
		plain bool
		want  int // of 40 wraps that go to the member that signs
	}{
		{"by cost, the wraps go to the other member", false, 0},
		{"by plain count, the member that signs gets nearly as many", true, 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []string{"a", "b"}, func(cfg *group.Config) { cfg.PlainCount = c.plain }).start()
				for _, h := range r.hsms {
					h.set(func(h *hsm) { h.delay = time.Second })
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					if _, err := r.Do(t.Context(), sign); err != nil {
						t.Error(err)
					}
				})
				synctest.Wait()
				for range 40 {
					wg.Go(func() {
						if _, err := r.do(); err != nil {
							t.Error(err)
						}
					})
				}
				synctest.Wait()
				if got := r.member("a").InFlight - 1; got != c.want {
					t.Errorf("%d wraps went to the member that signs, want %d", got, c.want)
				}
				wg.Wait()
			})
		})
	}
}
