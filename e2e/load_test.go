package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"kmsd/internal/devserver"
	"kmsd/kms/client"
)

// mostWaiting is how many requests of an open load wait at most. Each that waits has a
// connection: without an end to them a machine that is late for a moment does nothing but
// make connections from then on. A member that hangs holds up as many, and that is seen.
const mostWaiting = 32

// openLoad sends requests at a fixed rate whether or not earlier ones have been
// answered, as many independent clients do, up to mostWaiting. An answer's time counts from the moment
// its request was due, so a stall shows on everything that it held up.
type openLoad struct {
	c        *client.Client
	key      string
	send     func(l *openLoad, due time.Time)
	interval time.Duration // between two that are sent
	slowed   float64       // how many times as long interval was made, for a slow machine; at least 1
	stop     context.CancelFunc
	done     chan struct{} // closed when every request has been answered

	mu         sync.Mutex // guards what follows
	out        outcome
	since      time.Time          // the times of requests that were due before do not count
	unanswered map[time.Time]bool // :: due → it has not been answered
}

// outcome is how requests ended.
type outcome struct {
	times    []time.Duration // of each answer
	failures []error
	slowed   float64 // how many times as many requests a fast machine would have been sent
}

// startLoad begins to wrap and unwrap with the key: so many wraps each second, and
// after each an unwrap.
func startLoad(t *testing.T, c *client.Client, key string, pairsPerSecond int) *openLoad {
	t.Helper()
	return startOpenLoad(t, &openLoad{c: c, key: key, send: (*openLoad).pair, interval: time.Second / time.Duration(pairsPerSecond)})
}

// startOpenLoad begins to send what l says.
func startOpenLoad(t *testing.T, l *openLoad) *openLoad {
	t.Helper()
	l.pace(t)
	ctx, stop := context.WithCancel(context.Background())
	l.stop, l.done = stop, make(chan struct{})
	go l.run(ctx)
	t.Cleanup(func() { l.end() })
	return l
}

// pace makes a load no faster than a single program is answered that sends one request
// after the other. More would pile up on a machine that is slow, and wait for itself.
func (l *openLoad) pace(t *testing.T) {
	t.Helper()
	var alone outcome
	for range 20 {
		begin := time.Now()
		l.send(l, begin)
		alone.times = append(alone.times, time.Since(begin))
	}
	l.take().noFailure(t)
	l.slowed = max(1, float64(alone.quantile(0.5))/float64(l.interval))
	l.interval = time.Duration(l.slowed * float64(l.interval))
}

// startPrograms has so many programs send what l says, each one request at a time and
// at most one in l.interval, so that there is an end to how many wait.
func startPrograms(t *testing.T, l *openLoad, programs int) *openLoad {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	l.stop, l.done = stop, make(chan struct{})
	var wg sync.WaitGroup
	for range programs {
		wg.Go(func() {
			for ctx.Err() == nil {
				begin := time.Now()
				l.send(l, begin)
				select {
				case <-ctx.Done():
				case <-time.After(time.Until(begin.Add(l.interval))):
				}
			}
		})
	}
	go func() {
		defer close(l.done)
		wg.Wait()
	}()
	t.Cleanup(func() { l.end() })
	return l
}

func (l *openLoad) run(ctx context.Context) {
	defer close(l.done)
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	waiting := make(chan struct{}, mostWaiting) // holds one token for each that waits
	begin := time.Now()
	for sent := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for ; time.Since(begin) >= time.Duration(sent)*l.interval; sent++ {
			at := begin.Add(time.Duration(sent) * l.interval)
			select {
			case waiting <- struct{}{}:
				l.track(at, true)
				wg.Go(func() {
					defer func() { <-waiting }()
					defer l.track(at, false)
					l.send(l, at)
				})
			default: // it is not sent at all
			}
		}
	}
}

// pair wraps at a moment and unwraps as soon as that is answered.
func (l *openLoad) pair(at time.Time) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	plain, aad := random(32), []byte("open load")
	wrapped, err := l.c.Wrap(ctx, l.key, plain, aad)
	answered := l.record(at, "wrap", err)
	if err != nil {
		return
	}
	got, err := l.c.Unwrap(ctx, l.key, wrapped, aad)
	if err == nil && !bytes.Equal(got, plain) {
		err = errors.New("another plaintext came back")
	}
	l.record(answered, "unwrap", err)
}

func (l *openLoad) record(due time.Time, op string, err error) time.Time {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !due.Before(l.since) {
		l.out.times = append(l.out.times, now.Sub(due))
	}
	if err != nil {
		l.out.failures = append(l.out.failures, fmt.Errorf("%s, after %v: %w", op, now.Sub(due), err))
	}
	return now
}

// track notes that a request waits for its answer, or does so no more.
func (l *openLoad) track(due time.Time, waits bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.unanswered == nil {
		l.unanswered = make(map[time.Time]bool)
	}
	if l.unanswered[due] = true; !waits {
		delete(l.unanswered, due)
	}
}

// begin forgets the times of all requests that are due before now, those too that have not
// been answered yet: whatever delays them has begun before. It returns what take would.
func (l *openLoad) begin() outcome {
	o := l.take()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.since = time.Now()
	return o
}

// sinceBegin returns how the requests since begin ended that are due before now.
func (l *openLoad) sinceBegin(t *testing.T) outcome {
	t.Helper()
	l.answered(t)
	return l.take()
}

// answered waits until all requests have been answered that are due before now.
func (l *openLoad) answered(t *testing.T) {
	t.Helper()
	now := time.Now()
	await(t, recoveredIn, func(ctx context.Context) error {
		return devserver.Poll(ctx, func() error {
			l.mu.Lock()
			defer l.mu.Unlock()
			for due := range l.unanswered {
				if due.Before(now) {
					return fmt.Errorf("a request has been waiting for %v", time.Since(due))
				}
			}
			return nil
		})
	})
}

// take returns how the requests since the last take ended.
func (l *openLoad) take() outcome {
	l.mu.Lock()
	defer l.mu.Unlock()
	o := l.out
	o.slowed = max(1, l.slowed)
	l.out = outcome{}
	return o
}

// end waits for every answer and returns what take would.
func (l *openLoad) end() outcome {
	l.stop()
	<-l.done
	return l.take()
}

// quantile returns the time within which the share q of the requests was answered.
func (o outcome) quantile(q float64) time.Duration {
	if len(o.times) == 0 {
		return 0
	}
	slices.Sort(o.times)
	return o.times[int(q*float64(len(o.times)-1))]
}

func (o outcome) String() string {
	return fmt.Sprintf("%d requests, %d failed, answered within %v (half), %v (99 %%), %v (all)",
		len(o.times), len(o.failures), o.quantile(0.5), o.quantile(0.99), o.quantile(1))
}

// noneFailed fails the test when a request failed or there were fewer than least, which
// counts at the rate that was asked for.
func (o outcome) noneFailed(t *testing.T, least int) {
	t.Helper()
	t.Log(o)
	if float64(len(o.times))*o.slowed < float64(least) {
		t.Errorf("only %d requests at a rate that was made %.1f times lower; it proves nothing below %d at the full rate", len(o.times), o.slowed, least)
	}
	o.noFailure(t)
}

// noFailure fails the test when a request failed.
func (o outcome) noFailure(t *testing.T) {
	t.Helper()
	if len(o.failures) > 0 {
		t.Errorf("%d of %d requests failed, the first: %v", len(o.failures), len(o.times), o.failures[0])
	}
}
