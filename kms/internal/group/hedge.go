package group

import "time"

const (
	hedgeFloor   = 5 * time.Millisecond // a command is never slow before this
	hedgeShare   = 0.05                 // extra commands for each command
	hedgeSavings = 10                   // extra commands that a quiet time can save up
	hedgeRefresh = 64                   // answers between two looks at the times

	// strikesOut is how often a member is found to let a command wait, without any
	// answer in between, before it is taken to hang.
	strikesOut = 4
)

// hedger says when a command without an answer is worth a second member. There are
// two reasons, and only the first one is limited:
//
//   - The command is slow. That may be the command's nature, and then a second member
//     is as slow and all of them do more work, so there is a budget.
//   - Its member hangs: it has left several commands waiting and said nothing at all,
//     while others have answered. All of its commands move, however many they are.
//
// What is slow is known for each effort apart: a signature with RSA is not slow
// because it takes as long as a thousand encryptions. It has no lock of its own.
type hedger struct {
	tempos [efforts]tempo
	tokens float64 // extra commands in the budget
}

// tempo is how fast the commands of one effort are answered by the whole group.
type tempo struct {
	limit time.Duration // longest that look and slow become
	look  time.Duration // a member that says nothing for this long may hang: twice the p90
	slow  time.Duration // a command without an answer for this long is slow: twice the p99
	times latency
	fresh int // answers since look and slow were worked out
}

func newHedger(limit time.Duration) hedger {
	h := hedger{tokens: hedgeSavings}
	for i := range h.tempos {
		first := min(hedgeFloor, limit)
		h.tempos[i] = tempo{limit: limit, look: first, slow: first}
	}
	return h
}

// sent notes a command, which earns a share of an extra one.
func (h *hedger) sent() { h.tokens = min(h.tokens+hedgeShare, hedgeSavings) }

// afford takes an extra command out of the budget.
func (h *hedger) afford() bool {
	if h.tokens < 1 {
		return false
	}
	h.tokens--
	return true
}

// took notes how long an answer took.
func (p *tempo) took(d time.Duration) {
	p.times.add(d)
	if p.fresh++; p.fresh >= hedgeRefresh {
		p.fresh = 0
		p.look = p.within(2 * p.times.quantile(0.90))
		p.slow = p.within(2 * p.times.quantile(0.99))
	}
}

func (p *tempo) within(d time.Duration) time.Duration { return min(max(d, hedgeFloor), p.limit) }

// need is what a command without an answer needs.
type need uint8

const (
	needNothing need = iota
	needHedge        // it is slow
	needAway         // every member that has it seems to hang
)

// waits finds out what the command needs, when its members have let it wait, and
// when to ask again.
func (d *dispatch) waits(now time.Time) (what need, again time.Duration) {
	g := d.g
	g.mu.Lock()
	defer g.mu.Unlock()
	p := &g.hedge.tempos[d.effort]
	hang, slow := true, !d.hedged
	again = p.look
	for _, a := range d.live {
		if a == nil || a.gone == nil { // nil: it is known to be silent
			continue
		}
		hangs, next := g.strikeLocked(a, now, p.look)
		if hangs {
			a.hung = true
			continue
		}
		hang = false
		if age := now.Sub(a.began); age < p.slow {
			slow = false
			if !d.hedged {
				next = min(next, p.slow-age)
			}
		}
		again = min(again, next)
	}
	switch again = max(again, time.Millisecond); {
	case hang:
		return needAway, again
	case slow:
		return needHedge, again
	default:
		return needNothing, again
	}
}

// strikeLocked reports whether a command's member seems to hang, and if not, when it
// might. A member that has said nothing for a while, though others have, gets a
// strike from each command that it keeps waiting; with its first answer they are
// forgotten.
func (g *Group) strikeLocked(a *attempt, now time.Time, look time.Duration) (hangs bool, next time.Duration) {
	l := a.l
	since := a.began
	if l.heard.After(since) {
		since = l.heard
	}
	if quiet := now.Sub(since); quiet < look {
		return false, look - quiet
	}
	if l.strikes < strikesOut && g.answersLocked(l, since) {
		l.strikes++
	}
	return l.strikes >= strikesOut, look
}

// answersLocked reports whether any other member has answered since a time.
func (g *Group) answersLocked(but *link, since time.Time) bool {
	for _, m := range g.members {
		if l := m.link; l != nil && l != but && l.heard.After(since) {
			return true
		}
	}
	return false
}
