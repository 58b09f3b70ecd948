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
	run   func(worker int) error
	began time.Time     // when a worker took it
	done  chan struct{} // closed when it has run
	err   error         // how it ended; read after done
}

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
				current.Store(j)
				j.err = j.run(worker)
				current.Store(nil)
			}
			close(j.done)
		}
	}
}

// settle waits until no job is running that was begun before a moment.
func (l *lane) settle(ctx context.Context, before time.Time) error {
	for i := range l.current {
		j := l.current[i].Load()
		if j == nil || !j.began.Before(before) {
			continue
		}
		select {
		case <-j.done:
		case <-ctx.Done():
			return ctx.Err()
		case <-l.quit:
			return errClosed()
		}
	}
	return nil
}

// do runs f on a worker and returns when it has run or ctx has ended. In the
// second case f may still be running: it must not use anything of the caller's.
func (l *lane) do(ctx context.Context, f func(worker int) error) error {
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
