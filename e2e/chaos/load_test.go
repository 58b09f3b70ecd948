package chaos_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kmsd/e2e/chaos"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

const (
	// deadline is that of a request, of which most need milliseconds.
	deadline = 10 * time.Second
	// hurry is what some requests have instead: they may fail, but not late.
	hurry = 100 * time.Millisecond
	// worksPerSecond is how many programs begin each second, whether or not the
	// earlier ones have been answered. Each sends one to three requests.
	worksPerSecond = 60
	// managers make, rotate and destroy keys, each about two a second.
	managers = 2
)

// envelope is a data key that was handed out.
type envelope struct {
	key          string
	wrapped, aad []byte
}

// load is what programs and operators do during the faults. Everything is taken down
// in the history.
type load struct {
	c       *client.Client // as programs use it: tries again until the deadline
	history *chaos.History
	shop    *shop
	keys    []string // that are only used and rotated; the last one signs
	stop    context.CancelFunc
	wg      sync.WaitGroup
	bursts  atomic.Int64 // keys that burst and doomed have made

	mu        sync.Mutex // guards the rest
	envelopes []envelope
	stalls    []chaos.Stall
	sent      int               // requests
	open      map[int]time.Time // :: number of a request that waits for its answer → its start
}

const signingKey = "signer"

// startLoad makes the keys and begins.
func startLoad(t *testing.T, s *site, history *chaos.History) *load {
	t.Helper()
	// A program that wants to survive a restart of kmsd tries again for as long as it
	// has time.
	c, err := s.env.Client(1000)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	l := &load{c: c, history: history, keys: []string{"shop", "people", "ledger", signingKey}, open: map[int]time.Time{}}
	for _, key := range l.keys {
		kind := ""
		if key == signingKey {
			kind = "ec-p256"
		}
		if !l.create(key, api.KeyOptions{Type: kind}) {
			t.Fatalf("creating key %s before any fault", key)
		}
	}
	l.shop = newShop(t, l, s)
	ctx, stop := context.WithCancel(context.Background())
	l.stop = stop
	l.wg.Go(func() { l.programs(ctx, worksPerSecond, l.work) })
	l.wg.Go(func() { l.programs(ctx, asksPerSecond, l.shop.ask) })
	l.wg.Go(func() { l.shop.rekeys(ctx, t) })
	l.wg.Go(func() { l.watch(ctx) })
	for m := range managers {
		l.wg.Go(func() { l.manager(ctx, m) })
	}
	t.Cleanup(l.end)
	s.load = l
	return l
}

// end waits for every answer.
func (l *load) end() {
	l.stop()
	l.wg.Wait()
}

// mostWaiting is how many programs wait for an answer at a time. While kmsd stands still
// nobody is answered, and a machine that has to take leave of many hundreds at once is
// late for that alone.
const mostWaiting = 128

// programs begin at a fixed rate, unless too many wait.
func (l *load) programs(ctx context.Context, perSecond time.Duration, work func()) {
	tick := time.NewTicker(time.Second / perSecond)
	defer tick.Stop()
	places := make(chan struct{}, mostWaiting)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		select {
		case places <- struct{}{}:
			l.wg.Go(func() {
				defer func() { <-places }()
				work()
			})
		default:
		}
	}
}

// work is what one program does.
func (l *load) work() {
	key := l.keys[rand.IntN(len(l.keys)-1)]
	switch rand.IntN(10) {
	case 0:
		l.dataKey(key)
	case 5:
		plain := random(32)
		l.do(chaos.Request{Op: chaos.Wrap, Key: key, Hurried: true}, func(ctx context.Context, r *chaos.Request) error {
			_, err := l.c.Wrap(ctx, key, plain, nil)
			return err
		})
	case 1:
		if e, ok := l.any(); ok {
			l.rewrap(e)
		}
	case 2:
		if e, ok := l.any(); ok {
			l.unwrap(e)
		}
	case 3:
		l.sign()
	case 4:
		l.do(chaos.Request{Op: chaos.Random}, func(ctx context.Context, r *chaos.Request) error {
			_, err := l.c.Random(ctx, "", 32)
			return err
		})
	default:
		if e, ok := l.wrap(key); ok {
			l.unwrap(e)
		}
	}
}

// do sends one request and takes down how it ended. It says whether it was
// acknowledged.
func (l *load) do(r chaos.Request, send func(context.Context, *chaos.Request) error) bool {
	r.Start = time.Now()
	defer l.note(r.Start)()
	r.Deadline = r.Start.Add(deadline)
	if r.Hurried {
		r.Deadline = r.Start.Add(hurry)
	}
	ctx, cancel := context.WithDeadline(context.Background(), r.Deadline)
	defer cancel()
	expired := make(chan time.Time, 1)
	stop := context.AfterFunc(ctx, func() { expired <- time.Now() })
	err := send(ctx, &r)
	r.End = time.Now()
	if !stop() {
		r.Expired = <-expired
	}
	if err != nil {
		e := api.AsError(err)
		r.Code, r.Message = e.Code, e.Message
	}
	l.history.Add(r)
	return err == nil
}

// note takes down that a request is sent, and returns what takes down that it has ended.
func (l *load) note(start time.Time) (ended func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent++
	number := l.sent
	l.open[number] = start
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.open, number)
	}
}

// answered waits until every request that was sent before then has ended.
func (l *load) answered(ctx context.Context, then time.Time) {
	_ = devserver.Poll(ctx, func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, start := range l.open {
			if start.Before(then) {
				return fmt.Errorf("one of %d waits since %s", len(l.open), start.Format(clock))
			}
		}
		return nil
	})
}

// any is one of the envelopes that were handed out, of the keys that are not
// destroyed.
func (l *load) any() (envelope, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for range 4 {
		if len(l.envelopes) == 0 {
			break
		}
		e := l.envelopes[rand.IntN(len(l.envelopes))]
		for _, key := range l.keys {
			if key == e.key {
				return e, true
			}
		}
	}
	return envelope{}, false
}

func (l *load) keep(e envelope) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.envelopes = append(l.envelopes, e)
}

func (l *load) wrap(key string) (envelope, bool) {
	plain, e := random(32), envelope{key: key, aad: random(8)}
	ok := l.do(chaos.Request{Op: chaos.Wrap, Key: key, Plain: chaos.Digest(plain)}, func(ctx context.Context, r *chaos.Request) (err error) {
		e.wrapped, err = l.c.Wrap(ctx, key, plain, e.aad)
		r.Envelope = chaos.Digest(e.wrapped)
		return err
	})
	if ok {
		l.keep(e)
	}
	return e, ok
}

func (l *load) unwrap(e envelope) bool {
	return l.do(chaos.Request{Op: chaos.Unwrap, Key: e.key, Envelope: chaos.Digest(e.wrapped)}, func(ctx context.Context, r *chaos.Request) error {
		plain, err := l.c.Unwrap(ctx, e.key, e.wrapped, e.aad)
		r.Plain = chaos.Digest(plain)
		return err
	})
}

func (l *load) rewrap(e envelope) {
	next := envelope{key: e.key, aad: e.aad}
	ok := l.do(chaos.Request{Op: chaos.Rewrap, Key: e.key, From: chaos.Digest(e.wrapped)}, func(ctx context.Context, r *chaos.Request) (err error) {
		next.wrapped, err = l.c.Rewrap(ctx, e.key, e.wrapped, e.aad)
		r.Envelope = chaos.Digest(next.wrapped)
		return err
	})
	if ok {
		l.keep(next)
	}
}

func (l *load) dataKey(key string) {
	e := envelope{key: key, aad: random(8)}
	ok := l.do(chaos.Request{Op: chaos.DataKey, Key: key}, func(ctx context.Context, r *chaos.Request) error {
		dk, err := l.c.DataKey(ctx, key, 32, e.aad)
		e.wrapped = dk.Wrapped
		r.Plain, r.Envelope = chaos.Digest(dk.Plaintext), chaos.Digest(dk.Wrapped)
		return err
	})
	if ok {
		l.keep(e)
	}
}

func (l *load) sign() {
	digest := sha256.Sum256(random(16))
	req := api.SignRequest{Digest: digest[:]}
	var sig api.Signature
	ok := l.do(chaos.Request{Op: chaos.Sign, Key: signingKey}, func(ctx context.Context, r *chaos.Request) (err error) {
		sig, err = l.c.Sign(ctx, signingKey, req)
		return err
	})
	if !ok {
		return
	}
	l.do(chaos.Request{Op: chaos.VerifySignature, Key: signingKey}, func(ctx context.Context, r *chaos.Request) (err error) {
		r.Valid, err = l.c.VerifySignature(ctx, signingKey, api.VerifyRequest{SignRequest: req, Signature: sig.Signature, Version: sig.Version})
		return err
	})
}

// least is min_copies of the group.
const least = 2

func (l *load) create(key string, opts api.KeyOptions) bool {
	return l.do(chaos.Request{Op: chaos.Create, Key: key, Least: least}, func(ctx context.Context, r *chaos.Request) error {
		k, err := l.c.CreateMasterKey(ctx, key, opts)
		if err == nil && len(k.Versions) > 0 {
			r.Version, r.Copies = k.Versions[0].Number, k.Versions[0].Copies
		}
		return err
	})
}

func (l *load) rotate(key string) bool {
	return l.do(chaos.Request{Op: chaos.Rotate, Key: key, Least: least}, func(ctx context.Context, r *chaos.Request) error {
		v, err := l.c.RotateWith(ctx, key, api.RotateOptions{})
		r.Version, r.Copies = v.Number, v.Copies
		return err
	})
}

// change disables, enables or destroys a key.
func (l *load) change(op chaos.Op, key string) bool {
	return l.do(chaos.Request{Op: op, Key: key}, func(ctx context.Context, _ *chaos.Request) (err error) {
		switch op {
		case chaos.Disable:
			_, err = l.c.Disable(ctx, key)
		case chaos.Enable:
			_, err = l.c.Enable(ctx, key)
		case chaos.Destroy:
			_, err = l.c.Destroy(ctx, key, 0)
		}
		return err
	})
}

// manager leads keys through their lives, one after the other. It goes on with the
// next when something was refused, as nothing is that need succeed.
func (l *load) manager(ctx context.Context, number int) {
	for n := 0; ctx.Err() == nil; n++ {
		l.lead(fmt.Sprintf("key-%d-%d", number, n))
		if rand.IntN(10) == 0 {
			l.rotate(l.keys[rand.IntN(len(l.keys)-1)])
		}
		pause(ctx, time.Duration(200+rand.IntN(400))*time.Millisecond)
	}
}

// lead is the life of a key.
func (l *load) lead(key string) {
	if !l.create(key, api.KeyOptions{}) {
		return
	}
	first, ok := l.wrap(key)
	if !ok || !l.unwrap(first) || !l.rotate(key) {
		return
	}
	second, ok := l.wrap(key)
	if !ok || !l.unwrap(first) || !l.unwrap(second) {
		return
	}
	if rand.IntN(3) == 0 {
		if !l.change(chaos.Disable, key) {
			return
		}
		l.unwrap(first) // in vain
		if !l.change(chaos.Enable, key) || !l.unwrap(first) {
			return
		}
	}
	if rand.IntN(5) > 0 && l.change(chaos.Destroy, key) {
		l.unwrap(second) // in vain
	}
}

// doomed makes a key, and returns what destroys it, so that a member that leaves before
// and returns after that holds a key that must not come back.
func (l *load) doomed() (destroy func()) {
	key := fmt.Sprintf("doomed-%d", l.bursts.Add(1))
	if !l.create(key, api.KeyOptions{}) {
		return func() {}
	}
	e, ok := l.wrap(key)
	return func() {
		if l.change(chaos.Destroy, key) && ok {
			l.unwrap(e) // in vain
		}
	}
}

// burst makes keys one after the other for a while, so that something is written where a
// fault is in the way, and destroys them again when healed is called.
func (l *load) burst(ctx context.Context, d time.Duration) (healed func()) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	var made []string
	for ctx.Err() == nil {
		key := fmt.Sprintf("burst-%d", l.bursts.Add(1))
		if l.create(key, api.KeyOptions{}) {
			made = append(made, key)
		} else {
			pause(ctx, 20*time.Millisecond)
		}
	}
	return func() {
		for _, key := range made {
			l.change(chaos.Destroy, key)
		}
	}
}
