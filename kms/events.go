package kms

import (
	"context"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
)

const (
	// maxWaiting is how many events wait for a slow reader before the oldest are
	// dropped.
	maxWaiting = 256
	// maxRemembered is how many events of groups and members Log can tell of, see history.
	maxRemembered = 1024
	// maxCause is how much of a cause is kept, in bytes: it may be what a driver said.
	maxCause = 1024
)

// hub gives every event to every reader, and remembers and logs those of groups and
// members. It never waits for a reader.
type hub struct {
	log hclog.Logger // the HA log

	mu      sync.Mutex           // guards the rest, and the readers' fields
	readers map[*reader]struct{} // those who listen now
	past    history
	closed  bool
}

// reader is one who listens. Its fields are guarded by hub.mu.
type reader struct {
	waiting []api.Event
	dropped int           // events that were dropped since the last delivery
	news    chan struct{} // holds one token while something waits, or the hub is closed
}

func newHub(log hclog.Logger) *hub {
	return &hub{log: log.Named("ha"), readers: make(map[*reader]struct{})}
}

// publish hands an event to all readers. An event without a time gets now. The log is
// written without the lock: whoever reads it may be slow.
func (h *hub) publish(e api.Event) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Time = e.Time.UTC()
	e.Cause = clip(e.Cause, maxCause)
	keep := memorable(e)
	h.deliver(e, keep)
	if keep {
		writeHALog(h.log, e)
	}
}

func (h *hub) deliver(e api.Event, keep bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if keep {
		h.past.add(e)
	}
	for r := range h.readers {
		if len(r.waiting) >= maxWaiting {
			r.waiting = r.waiting[1:]
			r.dropped++
		}
		r.waiting = append(r.waiting, e)
		wake(r.news)
	}
}

// last returns the newest n events that are remembered, oldest first; 0 means all.
func (h *hub) last(n int) []api.Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.past.last(n)
}

// listen yields what is published from now on, until ctx ends, the loop breaks or
// the hub is closed. The reader is in place when listen returns, so that nothing
// between that and the loop is missed.
func (h *hub) listen(ctx context.Context) iter.Seq[api.Event] {
	r := &reader{news: make(chan struct{}, 1)}
	h.mu.Lock()
	h.readers[r] = struct{}{}
	closed := h.closed
	h.mu.Unlock()
	if closed {
		wake(r.news)
	}
	stop := context.AfterFunc(ctx, func() { h.leave(r) }) // also when nobody ever loops
	return func(yield func(api.Event) bool) {
		defer stop()
		defer h.leave(r)
		for {
			select {
			case <-r.news:
			case <-ctx.Done():
				return
			}
			events, closed := h.take(r)
			for _, e := range events {
				if ctx.Err() != nil || !yield(e) {
					return
				}
			}
			if closed {
				return
			}
		}
	}
}

// take returns what waits for a reader, with a note before it when something had
// to be dropped.
func (h *hub) take(r *reader) (events []api.Event, closed bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if r.dropped > 0 {
		events = append(events, api.Event{
			Time: time.Now().UTC(), Type: api.EventDropped,
			Cause: fmt.Sprintf("%d events were dropped: the reader is too slow", r.dropped),
		})
	}
	events = append(events, r.waiting...)
	r.waiting, r.dropped = nil, 0
	return events, h.closed
}

func (h *hub) leave(r *reader) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.readers, r)
}

// close ends every reader's loop after what it has not seen yet.
func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for r := range h.readers {
		wake(r.news)
	}
}

// wake puts a token into a channel of one, unless there is one already.
func wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
