package p11

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"kmsd/pluginproto"
)

// lane is a queue with a fixed number of workers, each of which owns one session.
// Its length bounds both the calls inside the library and the goroutines that
// stay behind when callers give up.
type lane struct {
	jobs    chan *job
	quit    <-chan struct{}       // closed when the driver closes
	current []atomic.Pointer[job] // what each worker is at; nil: nothing
}

// queued is how many jobs wait in a lane before callers wait to hand theirs in.
const queued = 64

type job struct {
	ctx   context.Context
	run   func(worker int, j *job) error
	began time.Time     // when a worker took it
	due   atomic.Int64  // nanoseconds after began at which its present step is late
	done  chan struct{} // closed when it has run
	err   error         // how it ended; read after done
}

// How long a step of a job may take before probes wait for it.
const (
	// shortStep is for all but the making of keys. The longest that is sound, a
	// private RSA operation, takes a tenth of it.
	shortStep = time.Second
	// makingSecret and makingPair are for the making of keys, which no driver can
	// tell from a call that hangs.
	makingSecret = 15 * time.Second
	makingPair   = 10 * time.Minute

	// recheck is how often a probe looks at a step that is late.
	recheck = 50 * time.Millisecond
)

// expect begins a step that may take so long.
func (j *job) expect(most time.Duration) { j.due.Store(int64(time.Since(j.began) + most)) }

func (j *job) late() bool { return int64(time.Since(j.began)) > j.due.Load() }

// newLane starts n workers, numbered from first on. They end when quit is closed
// and belong to wg.
func newLane(wg *sync.WaitGroup, quit <-chan struct{}, first, n int) *lane {
	l := &lane{jobs: make(chan *job, queued), quit: quit, current: make([]atomic.Pointer[job], n)}
	for i := range n {
		wg.Go(func() { l.work(first+i, &l.current[i]) })
	}
	return l
}

func (l *lane) work(worker int, current *atomic.Pointer[job]) {
	for {
		select {
		case <-l.quit:
			return
		case j := <-l.jobs:
			if j.err = j.ctx.Err(); j.err == nil { // else its caller is gone; do not burden the token
				j.began = time.Now()
				j.due.Store(int64(shortStep))
				current.Store(j)
				j.err = j.run(worker, j)
				current.Store(nil)
			}
			close(j.done)
		}
	}
}

// settle waits until no job is late with its present step.
func (l *lane) settle(ctx context.Context) error {
	for i := range l.current {
		for j := l.current[i].Load(); j != nil && j.late(); j = l.current[i].Load() {
			again := time.NewTimer(recheck)
			select {
			case <-j.done:
			case <-again.C:
			case <-ctx.Done():
			case <-l.quit:
			}
			again.Stop()
			if err := ctx.Err(); err != nil {
				return err
			}
			select {
			case <-l.quit:
				return errClosed()
			default:
			}
		}
	}
	return nil
}

// do runs f on a worker and returns when it has run or ctx has ended. In the
// second case f may still be running: it must not use anything of the caller's.
func (l *lane) do(ctx context.Context, f func(worker int, j *job) error) error {
	if l == nil {
		return pluginproto.Errorf(pluginproto.ClassMember, "calling the driver", "it has not been opened")
	}
	j := &job{ctx: ctx, run: f, done: make(chan struct{})}
	select {
	case l.jobs <- j:
	case <-ctx.Done():
		return ctx.Err()
	case <-l.quit:
		return errClosed()
	}
	select {
	case <-j.done:
		return j.err
	case <-ctx.Done():
		return ctx.Err()
	case <-l.quit:
		return errClosed()
	}
}

func errClosed() error {
	return pluginproto.Errorf(pluginproto.ClassMember, "calling the driver", "it has been closed")
}
