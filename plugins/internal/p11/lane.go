package p11

import (
	"context"
	"sync"

	"kmsd/pluginproto"
)

// lane is a queue with a fixed number of workers, each of which owns one session.
// Its length bounds both the calls inside the library and the goroutines that
// stay behind when callers give up.
type lane struct {
	jobs chan *job
	quit <-chan struct{} // closed when the driver closes
}

// queued is how many jobs wait in a lane before callers wait to hand theirs in.
const queued = 64

type job struct {
	ctx  context.Context
	run  func(worker int) error
	done chan error // buffered, so that a worker never waits for a caller
}

// newLane starts n workers, numbered from first on. They end when quit is closed
// and belong to wg.
func newLane(wg *sync.WaitGroup, quit <-chan struct{}, first, n int) *lane {
	l := &lane{jobs: make(chan *job, queued), quit: quit}
	for i := range n {
		wg.Go(func() { l.work(first + i) })
	}
	return l
}

func (l *lane) work(worker int) {
	for {
		select {
		case <-l.quit:
			return
		case j := <-l.jobs:
			if err := j.ctx.Err(); err != nil {
				j.done <- err // its caller is gone; do not burden the token
				continue
			}
			j.done <- j.run(worker)
		}
	}
}

// do runs f on a worker and returns when it has run or ctx has ended. In the
// second case f may still be running: it must not use anything of the caller's.
func (l *lane) do(ctx context.Context, f func(worker int) error) error {
	if l == nil {
		return pluginproto.Errorf(pluginproto.ClassMember, "calling the driver", "it has not been opened")
	}
	j := &job{ctx: ctx, run: f, done: make(chan error, 1)}
	select {
	case l.jobs <- j:
	case <-ctx.Done():
		return ctx.Err()
	case <-l.quit:
		return errClosed()
	}
	select {
	case err := <-j.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-l.quit:
		return errClosed()
	}
}

func errClosed() error {
	return pluginproto.Errorf(pluginproto.ClassMember, "calling the driver", "it has been closed")
}
