package kms

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// wrapLimits says how often one version may wrap.
type wrapLimits struct {
	block  uint64 // how far the bound in the catalog is ahead of the count, at most
	warn   uint64 // from here on somebody is told
	rotate uint64 // from here on the janitor makes the next version
	most   uint64 // what comes after is refused
}

// orDefault returns what is safe in place of the zero value: AES-GCM with random IVs of
// 96 bits may be called 2^32 times under one key (NIST SP 800-38D, section 8.3). Wraps
// that fail count too, since a token may have used their IV.
func (limits wrapLimits) orDefault() wrapLimits {
	if limits == (wrapLimits{}) {
		return wrapLimits{block: 1 << 16, warn: 1 << 31, rotate: 1 << 32 / 16 * 15, most: 1 << 32}
	}
	return limits
}

// tally knows how often every version has wrapped. The counts are in memory; what the
// catalog has is an upper bound, written ahead by one goroutine, so that no wrap waits for
// a disk. A start goes on from the bound. What a crash loses is what was wrapped beyond
// the bound before it could be raised.
type tally struct {
	limits wrapLimits
	call   chan struct{} // holds one token while a count is due

	mu     sync.Mutex               // guards what follows
	counts map[string]*usage        // :: identity → its count
	bounds map[string]catalog.Usage // :: identity → what the catalog had at the start
	due    []*usage                 // those that have come to their mark
	warned []*usage                 // those that somebody has been told of
}

func newTally(limits wrapLimits) *tally {
	return &tally{
		limits: limits, call: make(chan struct{}, 1),
		counts: make(map[string]*usage), bounds: make(map[string]catalog.Usage),
	}
}

// usage is the count of one version, shared by all copies of its key.
type usage struct {
	tally  *tally
	key    string
	group  string
	number int

	wraps atomic.Uint64 // begun, or more
	mark  atomic.Uint64 // the count at which the tally is to look; never while it is about to

	// Of the tally's goroutine:
	bound  catalog.Usage // what the catalog has
	warned bool
}

const never = math.MaxUint64

// of returns the count of version v of a key.
func (t *tally) of(rec catalog.Key, v catalog.Version) *usage {
	t.mu.Lock()
	defer t.mu.Unlock()
	if u := t.counts[v.Identity]; u != nil {
		return u
	}
	u := &usage{tally: t, key: rec.Name, group: rec.Group, number: v.Number}
	u.bound = t.bounds[v.Identity]
	u.bound.Identity = v.Identity
	u.wraps.Store(u.bound.Wraps)
	u.mark.Store(u.bound.Wraps + 1)
	t.counts[v.Identity] = u
	return u
}

// more counts one more wrap, before it is made, and reports whether it may be.
func (u *usage) more() bool {
	n := u.wraps.Add(1)
	if n >= u.mark.Load() {
		u.tally.look(u)
	}
	return n <= u.tally.limits.most
}

// count is how often the version has wrapped, at least; none counts for 0.
func (u *usage) count() uint64 {
	if u == nil {
		return 0
	}
	return min(u.wraps.Load(), u.tally.limits.most)
}

// spent reports whether it is time for the next version.
func (u *usage) spent() bool { return u != nil && u.wraps.Load() >= u.tally.limits.rotate }

func (t *tally) look(u *usage) {
	if u.mark.Swap(never) == never {
		return // somebody else has said so
	}
	t.mu.Lock()
	t.due = append(t.due, u)
	t.mu.Unlock()
	wake(t.call)
}

// take returns some of the counts that are due.
func (t *tally) take() []*usage {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := min(len(t.due), catalog.BatchSize)
	some := slices.Clone(t.due[:n])
	t.due = t.due[n:]
	return some
}

func (t *tally) putBack(some []*usage) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.due = append(t.due, some...)
}

// loadUsages reads the bounds, before the keys.
func (k *KMS) loadUsages(ctx context.Context) error {
	t := k.ring.tally
	t.mu.Lock()
	defer t.mu.Unlock()
	for u, err := range k.catalog.Usages(ctx) {
		if err != nil {
			return err
		}
		t.bounds[u.Identity] = u
	}
	return nil
}

// keepTally raises bounds when counts come near them, until ctx ends, and sees to it that
// versions that have wrapped often are noticed.
func (k *KMS) keepTally(ctx context.Context) {
	t := k.ring.tally
	retry := time.NewTimer(idle)
	retry.Stop()
	defer retry.Stop()
	failing := false
	for {
		select {
		case <-t.call:
		case <-retry.C:
		case <-ctx.Done():
			return
		}
		for some := t.take(); len(some) > 0; some = t.take() {
			err := k.raise(ctx, some)
			if ctx.Err() != nil {
				return
			}
			for _, u := range some { // whether or not the disk is full
				k.notice(u)
			}
			if err == nil {
				failing = false
				continue
			}
			if !failing {
				k.log.Warn("how often keys have wrapped is still to be written down", "error", err)
			}
			failing = true
			t.putBack(some)
			retry.Reset(soon)
			break
		}
	}
}

// raise writes new bounds for counts that have come to their mark, and sets the next.
func (k *KMS) raise(ctx context.Context, some []*usage) error {
	limits := k.ring.tally.limits
	counts := make([]uint64, len(some)) // as they are now
	bounds := make([]catalog.Usage, len(some))
	for i, u := range some {
		counts[i] = u.count()
		bounds[i] = u.bound
		bounds[i].Wraps = max(u.bound.Wraps, min(counts[i]+limits.block, limits.most))
	}
	written, err := k.catalog.PutUsages(ctx, bounds...)
	if err != nil {
		return errors.Join(err, k.reread(ctx, some)) // they may be written all the same
	}
	for i, u := range some {
		u.bound = written[i]
		if counts[i] < limits.most {
			u.mark.Store(counts[i] + max(1, limits.block/2))
		}
	}
	return nil
}

func (k *KMS) reread(ctx context.Context, some []*usage) error {
	for _, u := range some {
		stored, err := k.catalog.Usage(ctx, u.bound.Identity)
		switch {
		case err == nil:
			u.bound = stored
		case !errors.Is(err, catalog.ErrNotFound):
			return err
		}
	}
	return nil
}

// notice tells once that a version has wrapped very often, and has the janitor make the
// next one in time.
func (k *KMS) notice(u *usage) {
	n, limits := u.count(), k.ring.tally.limits
	if n >= limits.warn && !u.warned {
		u.warned = true
		k.ring.tally.warn(u)
		cause := fmt.Sprintf("version %d has wrapped %d times of at most %d; rotate the key, or it is rotated at %d", u.number, n, limits.most, limits.rotate)
		k.log.Warn("key has wrapped very often", "key", u.key, "group", u.group, "cause", cause)
		k.events.publish(api.Event{Type: api.EventKey, Group: u.group, Key: u.key, To: "wearing_out", Cause: cause, Alarm: true})
	}
	if g := k.byName[u.group]; g != nil && u.spent() {
		g.janitor.wake()
	}
}

func (t *tally) warn(u *usage) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.warned = append(t.warned, u)
}

// wearing returns how many keys of a group wrap under a version that has wrapped very
// often.
func (r *keyring) wearing(group string) int {
	r.tally.mu.Lock()
	warned := slices.Clone(r.tally.warned)
	r.tally.mu.Unlock()
	n := 0
	for _, u := range warned {
		if key, err := r.get(u.key); err == nil && u.group == group && key.primary >= 0 && key.uses[key.primary] == u {
			n++
		}
	}
	return n
}

// countWrap counts a wrap under the newest enabled version of a key, and refuses it when
// there were too many.
func (k *key) countWrap() error {
	u := k.uses[k.primary]
	if u.more() {
		return nil
	}
	return stateError("rotate the key", "version %d of key %s has wrapped %d times, and no key may wrap more often (NIST SP 800-38D)",
		u.number, u.key, u.tally.limits.most)
}

// keyToAPI returns a record as users see it, with how often its versions have wrapped.
func (k *KMS) keyToAPI(rec catalog.Key) api.Key {
	shown := toAPI(rec)
	if key, err := k.ring.get(rec.Name); err == nil {
		for i := range min(len(key.uses), len(shown.Versions)) { // versions are never taken away
			shown.Versions[i].Wraps = key.uses[i].count()
		}
	}
	return shown
}
