package group

import "time"

const (
	hedgeFloor   = 5 * time.Millisecond // a command is never slow before this
	hedgeShare   = 0.05                 // extra commands for each command
	hedgeSavings = 10                   // extra commands that a quiet time can save up
	hedgeRefresh = 64                   // answers between two looks at the p99
)

// hedger says when a command is slow enough to go to a second member too, and
// whether there is one left in the budget. It has no lock of its own.
type hedger struct {
	after  time.Duration // a command without an answer for this long is slow
	limit  time.Duration // longest that after becomes
	tokens float64       // extra commands in the budget
	times  latency       // of the whole group
	fresh  int           // answers since after was worked out
}

func newHedger(limit time.Duration) hedger {
	return hedger{after: min(hedgeFloor, limit), limit: limit, tokens: hedgeSavings}
}

// sent notes a command, which earns a share of an extra one.
func (h *hedger) sent() { h.tokens = min(h.tokens+hedgeShare, hedgeSavings) }

// took notes how long an answer took.
func (h *hedger) took(d time.Duration) {
	h.times.add(d)
	if h.fresh++; h.fresh >= hedgeRefresh {
		h.fresh = 0
		h.after = min(max(2*h.times.quantile(0.99), hedgeFloor), h.limit)
	}
}

// afford takes an extra command out of the budget.
func (h *hedger) afford() bool {
	if h.tokens < 1 {
		return false
	}
	h.tokens--
	return true
}
