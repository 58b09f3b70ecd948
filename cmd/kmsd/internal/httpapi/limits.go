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
	if l.Strangers == 0 {
		l.Strangers = strangerBurst
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
