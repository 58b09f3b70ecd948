package httpapi

import (
	"context"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/time/rate"

	"kmsd/kms/api"
)

// Requests of strangers that are written down one by one: so many at once, and so
// many per second after that. It is 30 MB a day at most.
const (
	strangerBurst = 100
	strangerRate  = 1
)

// summaryPause is how long requests are counted before their number is written down.
const summaryPause = 10 * time.Second

// strangers keeps those who cannot prove who they are from filling the disk with the
// records of their attempts: a full disk would end the audit log, and with it every
// answer. What is not written down one by one is counted, and the count is written.
type strangers struct {
	audit  Auditor
	log    hclog.Logger
	bucket *rate.Limiter
	pause  time.Duration

	mu      sync.Mutex // guards the rest
	counted int
	since   time.Time   // of the first that was counted
	timer   *time.Timer // nil when nothing is counted
}

func newStrangers(audit Auditor, log hclog.Logger, burst int, pause time.Duration) *strangers {
	return &strangers{audit: audit, log: log, bucket: rate.NewLimiter(strangerRate, burst), pause: pause}
}

// take says whether the request of a stranger is to be written down; if not, it has
// been counted, and the error is its answer.
func (s *strangers) take(at time.Time) error {
	if s.bucket.Allow() {
		return nil
	}
	s.count(1, at)
	e := api.NewError(api.CodeRateLimited, "too many requests of clients that are not authenticated", nil)
	e.RetryAfterMS = 1000
	return e
}

func (s *strangers) count(n int, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.counted == 0 {
		s.since = at
	}
	s.counted += n
	if s.timer == nil {
		s.timer = time.AfterFunc(s.pause, s.flush)
	}
}

// flush writes down how many were counted. What cannot be written stays counted.
func (s *strangers) flush() {
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
	r := Record{Time: since, Outcome: string(api.CodeUnauthenticated), Suppressed: n, Duration: time.Since(since)}
	if err := s.audit.Record(context.Background(), r); err != nil {
		s.log.Error("the audit log cannot be written", "suppressed", n, "error", err)
		s.count(n, since)
	}
}
