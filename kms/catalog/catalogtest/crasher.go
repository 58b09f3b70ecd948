package catalogtest

import (
	"context"
	"errors"
	"iter"
	"sync"

	"kmsd/kms/catalog"
)

// ErrCrashed is what a Crasher answers once it has crashed.
var ErrCrashed = errors.New("the process has crashed (catalogtest.Crasher)")

// Crasher is a Store whose process "crashes" at a chosen step. Each Apply has two
// steps: before it is written and after. From the chosen step on every call fails
// with ErrCrashed, as if nothing of this process ran any more, and the Store below
// keeps what was written before. A test runs its story with step 1, 2, 3, ...,
// opens the Store below anew and checks, until Crashed says that the story ended
// before the step was reached:
//
//	for step := 1; ; step++ {
//		store := catalogtest.NewMemory()
//		c := catalogtest.NewCrasher(store, step)
//		story(c)
//		check(store)
//		if !c.Crashed() {
//			break
//		}
//	}
type Crasher struct {
	below catalog.Store
	at    int

	mu      sync.Mutex // guards what follows
	step    int        // steps taken
	crashed bool
}

// NewCrasher wraps s. Step 2n-1 crashes before the n-th Apply is written, step 2n
// after it and before it is answered; 0 never crashes. Applies are counted in the
// order in which they begin. Close does not close s.
func NewCrasher(s catalog.Store, step int) *Crasher {
	return &Crasher{below: s, at: step}
}

// Crashed says whether the step was reached.
func (c *Crasher) Crashed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.crashed
}

// Crash crashes now.
func (c *Crasher) Crash() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.crashed = true
}

func (c *Crasher) Get(ctx context.Context, kind catalog.Kind, id string) (catalog.Record, error) {
	if c.Crashed() {
		return catalog.Record{}, ErrCrashed
	}
	return c.below.Get(ctx, kind, id)
}

func (c *Crasher) List(ctx context.Context, kind catalog.Kind, prefix, after string, limit int) iter.Seq2[catalog.Record, error] {
	return func(yield func(catalog.Record, error) bool) {
		for r, err := range c.below.List(ctx, kind, prefix, after, limit) {
			if c.Crashed() {
				yield(catalog.Record{}, ErrCrashed)
				return
			}
			if !yield(r, err) {
				return
			}
		}
		if c.Crashed() {
			yield(catalog.Record{}, ErrCrashed)
		}
	}
}

func (c *Crasher) Count(ctx context.Context, kind catalog.Kind, prefix string) (int, error) {
	if c.Crashed() {
		return 0, ErrCrashed
	}
	return c.below.Count(ctx, kind, prefix)
}

// Apply holds the lock while the Store below writes, so that two Applies never
// share a step.
func (c *Crasher) Apply(ctx context.Context, changes ...catalog.Record) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reachLocked() {
		return 0, ErrCrashed
	}
	rev, err := c.below.Apply(ctx, changes...)
	if c.reachLocked() {
		return 0, ErrCrashed
	}
	return rev, err
}

// reachLocked takes a step and says whether the process has crashed.
func (c *Crasher) reachLocked() bool {
	if !c.crashed {
		c.step++
		c.crashed = c.step == c.at
	}
	return c.crashed
}

func (c *Crasher) Rev(ctx context.Context) (uint64, error) {
	if c.Crashed() {
		return 0, ErrCrashed
	}
	return c.below.Rev(ctx)
}

func (c *Crasher) Close() error { return nil }
