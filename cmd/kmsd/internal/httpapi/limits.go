package httpapi

import (
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"kmsd/kms/api"
)

func (l Limits) withDefaults() Limits {
	if l.InFlight == 0 {
		l.InFlight = 4096
	}
	if l.Streams == 0 {
		l.Streams = 64
	}
	if l.StreamsEach == 0 {
		l.StreamsEach = max(1, l.Streams/4)
	}
	if l.Timeout == 0 {
		l.Timeout = 30 * time.Second
	}
	if l.Burst == 0 {
		l.Burst = max(1, int(math.Ceil(l.Rate)))
	}
	return l
}

// rates has a token bucket for each principal. Principals come from configuration, so that there are few.
type rates struct {
	limit rate.Limit
	burst int

	mu      sync.Mutex               // guards buckets
	buckets map[string]*rate.Limiter // :: principal → its bucket
}

// newRates returns nil, which limits nothing, when perSecond is zero.
func newRates(perSecond float64, burst int) *rates {
	if perSecond <= 0 {
		return nil
	}
	return &rates{limit: rate.Limit(perSecond), burst: burst, buckets: make(map[string]*rate.Limiter)}
}

// take counts one request of a principal, or says when to come back.
func (l *rates) take(principal string) error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	b := l.buckets[principal]
	if b == nil {
		b = rate.NewLimiter(l.limit, l.burst)
		l.buckets[principal] = b
	}
	l.mu.Unlock()

	r := b.Reserve()
	wait := r.Delay()
	if wait == 0 {
		return nil
	}
	r.Cancel()
	e := api.NewError(api.CodeRateLimited, "too many requests from principal "+principal, nil)
	e.RetryAfterMS = max(1, wait.Milliseconds())
	return e
}

// streams counts the event streams that are open.
type streams struct {
	most, mostEach int

	mu   sync.Mutex     // guards the rest
	open int            // in all
	each map[string]int // :: principal → open
}

func newStreams(most, each int) *streams {
	return &streams{most: most, mostEach: each, each: make(map[string]int)}
}

// enter counts one stream in; leave must follow unless there is an error.
func (s *streams) enter(principal string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	message := ""
	switch {
	case s.open >= s.most:
		message = "too many event streams are open"
	case s.each[principal] >= s.mostEach:
		message = "too many event streams of principal " + principal + " are open"
	default:
		s.open++
		s.each[principal]++
		return nil
	}
	e := api.NewError(api.CodeRateLimited, message, nil)
	e.RetryAfterMS = 1000
	return e
}

func (s *streams) leave(principal string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open--
	if s.each[principal]--; s.each[principal] == 0 {
		delete(s.each, principal)
	}
}
