package pluginproto

import "sync"

// outbox is what waits to be sent on one stream. Whoever has something puts it in
// and goes on; one writer takes all that has gathered while the last message was
// being sent. That is the whole of coalescing: no timer, no pause.
type outbox[T any] struct {
	// ready holds a token while something waits, or may.
	ready chan struct{}

	mu      sync.Mutex // guards what follows
	waiting []T
	sizes   []int // bytes on the wire, one for each in waiting
	bytes   int   // their sum
	closed  bool  // nothing will be taken any more
}

func newOutbox[T any]() *outbox[T] {
	return &outbox[T]{ready: make(chan struct{}, 1)}
}

// put adds one thing that takes about size bytes on the wire. False: it is too late for it,
// and it stays the caller's.
func (o *outbox[T]) put(item T, size int) bool {
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		return false
	}
	o.waiting = append(o.waiting, item)
	o.sizes = append(o.sizes, size)
	o.bytes += size
	o.mu.Unlock()
	o.wake()
	return true
}

// close returns what waits still, and lets nothing more come.
func (o *outbox[T]) close() (left []T) {
	o.mu.Lock()
	defer o.mu.Unlock()
	left = o.waiting
	o.waiting, o.sizes, o.bytes, o.closed = nil, nil, 0, true
	return left
}

func (o *outbox[T]) wake() {
	select {
	case o.ready <- struct{}{}:
	default:
	}
}

// take moves what waits to the end of into, oldest first, at least one thing and
// then as many as stay within maxBatch bytes. It does not wait.
func (o *outbox[T]) take(into []T) []T {
	o.mu.Lock()
	defer o.mu.Unlock()
	n, size := len(o.waiting), o.bytes
	if size > maxBatch {
		for n, size = 0, 0; n < len(o.waiting) && (n == 0 || size+o.sizes[n] <= maxBatch); n++ {
			size += o.sizes[n]
		}
		o.wake() // the rest is waiting still
	}
	into = append(into, o.waiting[:n]...)
	rest := copy(o.waiting, o.waiting[n:])
	clear(o.waiting[rest:])
	o.waiting = o.waiting[:rest]
	o.sizes = o.sizes[:copy(o.sizes, o.sizes[n:])]
	o.bytes -= size
	return into
}
