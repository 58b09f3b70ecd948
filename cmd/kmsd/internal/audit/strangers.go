package audit

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// Requests of strangers that are written down one by one: so many at once, and so many
	// per second after that. It is 30 MB a day at most.
	strangerBurst = 100
	strangerRate  = 1
	// summaryPause is how long requests are counted before their number is written down.
	summaryPause = 10 * time.Second
)

// Strangers keeps those who cannot prove who they are from filling the disk with the
// records of their attempts: a full disk would end the audit log, and with it every
// answer. What is not written down one by one is counted, and the count is written. All
// methods may be called concurrently.
type Strangers struct {
	write  func(since time.Time, suppressed int) error
	bucket *rate.Limiter

	// flushing is held while a number is written down, so that Flush returns only when
	// that of another Flush is written too. It is taken before mu.
	flushing sync.Mutex

	mu      sync.Mutex // guards the rest
	counted int
	since   time.Time   // of the first that was counted
	timer   *time.Timer // nil when nothing is counted
}

// NewStrangers returns a count that write is told of now and then: how many there were
// since the first of them. burst is how many are written down by themselves at once; zero
// means 100. After that it is one a second.
func NewStrangers(burst int, write func(since time.Time, suppressed int) error) *Strangers {
	if burst == 0 {
		burst = strangerBurst
	}
	return &Strangers{write: write, bucket: rate.NewLimiter(strangerRate, burst)}
}

// Take says whether the request of a stranger is to be written down by itself; if not,
// it has been counted.
func (s *Strangers) Take(at time.Time) bool {
	if s.bucket.Allow() {
		return true
	}
	s.count(1, at)
	return false
}

func (s *Strangers) count(n int, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.counted == 0 {
		s.since = at
	}
	s.counted += n
	if s.timer == nil {
		s.timer = time.AfterFunc(summaryPause, s.Flush)
	}
}

// Flush writes down how many were counted. What cannot be written stays counted.
func (s *Strangers) Flush() {
	s.flushing.Lock()
	defer s.flushing.Unlock()
	s.mu.Lock()
	n, since := s.counted, s.since
	s.counted = 0
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
	s.mu.Unlock()
	if n == 0 {
		return
	}
	if err := s.write(since, n); err != nil {
		s.count(n, since)
	}
}
