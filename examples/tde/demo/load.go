package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"kmsd/kms/api"
)

// load is work that goes on in the background, and the record of how each
// operation ended.
type load struct {
	wg   sync.WaitGroup
	stop context.CancelFunc
	ctx  context.Context // ends when the load is to stop

	mu       sync.Mutex // guards what follows
	counts   map[string]int
	failures int
	first    error // of the failures
	slowest  map[string]timing
}

// timing is the slowest operation of a kind.
type timing struct {
	took time.Duration
	op   string
	at   time.Time // when it began
}

// Kinds of operations, which are timed apart.
const (
	kindKey  = "key operation"  // wrap, unwrap, datakey, rewrap: what a database waits for
	kindMake = "key management" // making a master key or a version of it
	kindPage = "page"           // rows in and out, without kmsd
)

func newLoad() *load {
	ctx, stop := context.WithCancel(context.Background())
	return &load{ctx: ctx, stop: stop, counts: map[string]int{}, slowest: map[string]timing{}}
}

// do runs one operation and records it.
func (l *load) do(kind, op string, f func() error) error {
	begin := time.Now()
	err := f()
	took := time.Since(begin)

	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts[op]++
	if took > l.slowest[kind].took {
		l.slowest[kind] = timing{took: took, op: op, at: begin}
	}
	if err != nil {
		l.failures++
		if l.first == nil {
			l.first = fmt.Errorf("%s, after %v: %w", op, took.Round(time.Millisecond), err)
		}
	}
	return err
}

// every calls f at this interval, in the background, until the load stops.
func (l *load) every(interval time.Duration, f func(ctx context.Context)) {
	l.wg.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-l.ctx.Done():
				return
			case <-tick.C:
				// What has begun is finished: an operation that was cut off would count
				// as a failure.
				f(context.WithoutCancel(l.ctx))
			}
		}
	})
}

// total is the number of operations of databases on kmsd.
func (l *load) total() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for op, c := range l.counts {
		if op != "insert rows" && op != "read row" {
			n += c
		}
	}
	return n
}

// end stops the load and waits for it.
func (l *load) end() {
	l.stop()
	l.wg.Wait()
}

// keyClient wraps and unwraps with a master key, as a database does that opens
// tables all the time.
func (l *load) keyClient(svc api.Service, masterKey string) {
	aad := []byte("demo client")
	plain := make([]byte, 32)
	rand.Read(plain)
	l.every(10*time.Millisecond, func(ctx context.Context) {
		var wrapped []byte
		err := l.do(kindKey, "wrap", func() (err error) {
			wrapped, err = svc.Wrap(ctx, masterKey, plain, aad)
			return err
		})
		if err != nil {
			return
		}
		l.do(kindKey, "unwrap", func() error { return unwrapAndCompare(ctx, svc, masterKey, wrapped, aad, plain) })
	})
	l.every(50*time.Millisecond, func(ctx context.Context) {
		var dk api.DataKey
		err := l.do(kindKey, "datakey", func() (err error) {
			dk, err = svc.DataKey(ctx, masterKey, 32, aad)
			return err
		})
		if err != nil {
			return
		}
		l.do(kindKey, "unwrap", func() error { return unwrapAndCompare(ctx, svc, masterKey, dk.Wrapped, aad, dk.Plaintext) })
	})
}

var errOtherPlaintext = errors.New("unwrap gave another plaintext")

func unwrapAndCompare(ctx context.Context, svc api.Service, masterKey string, wrapped, aad, want []byte) error {
	got, err := svc.Unwrap(ctx, masterKey, wrapped, aad)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errOtherPlaintext
	}
	return nil
}
