package group

import (
	"math/rand/v2"
	"time"
)

const (
	firstPause = 250 * time.Millisecond // before the second attempt; doubles after that
	flapPause  = 2 * time.Second        // longest pause before the first attempt, for a member that is lost again and again
	steady     = 10 * time.Second       // a link that lived this long was no flapping

	// lostPause is the longest pause while nobody serves. The group is to be back soon
	// after the first HSM is.
	lostPause = 500 * time.Millisecond
)

// pace says how long to wait before the next attempt.
type pace struct {
	interval  time.Duration
	failures  int  // attempts in a row that did not bring the member into the group
	flaps     int  // links in a row that served for a short time only
	permanent bool // the last failure will not mend by itself
	toldEnd   bool // the end of the attempts has been told
}

// note takes down for how long an attempt's link served, and what ended it.
func (p *pace) note(served time.Duration, err error) {
	p.permanent = permanent(err)
	switch {
	case served == 0:
		p.failures++
		return
	case served < steady:
		p.flaps++
	default:
		p.flaps = 0
	}
	p.failures = 0
}

// pause returns the time until the next attempt: none after a loss, unless the
// member is lost again and again; then 250 ms, doubling up to the interval.
func (p *pace) pause() time.Duration {
	switch {
	case p.permanent:
		return jitter(p.interval)
	case p.failures > 0:
		return jitter(doubled(firstPause, p.failures-1, p.interval))
	case p.flaps > 1:
		return jitter(doubled(firstPause, p.flaps-2, min(flapPause, p.interval)))
	default:
		return 0
	}
}

// hasten returns the time of the next attempt while nobody serves, for one that was
// planned for due. Waiting less does not help against what will not mend by itself.
func (p *pace) hasten(now, due time.Time) time.Time {
	if p.permanent || due.Sub(now) <= lostPause {
		return due
	}
	return now.Add(lostPause - rand.N(lostPause/4))
}

// doubled is d doubled n times, at most limit.
func doubled(d time.Duration, n int, limit time.Duration) time.Duration {
	for ; n > 0 && d < limit; n-- {
		d *= 2
	}
	return min(d, limit)
}

// jitter varies a pause by a fifth either way, so that members lost together do
// not come back together.
func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}
