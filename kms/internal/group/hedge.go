package group

import (
	"time"

	"kmsd/kms/api"
)

const (
	hedgeFloor   = 5 * time.Millisecond // a command is never slow before this
	hedgeShare   = 0.05                 // extra commands for each command
	hedgeSavings = 10                   // extra commands that a quiet time can save up
	hedgeDebt    = 50                   // extra commands that can be taken in advance, for members that seem to hang
	hedgeRefresh = 64                   // times between two looks at their p99

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
//     not to a probe either, while others have answered. All of its commands move,
//     however many they are.
//
// It has no lock of its own.
type hedger struct {
	slow   [efforts]limit // of the answer to one command: what is long for a wrap is short for RSA
	quiet  limit          // of a member's silence while it owes an answer, whatever it is to
	tokens float64        // extra commands in the budget
}

func newHedger(most time.Duration) hedger {
	h := hedger{tokens: hedgeSavings, quiet: newLimit(most)}
	for i := range h.slow {
		h.slow[i] = newLimit(most)
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

// moved notes a command that was moved without being afforded. It is paid for later,
// within limits, so that members which only seem to hang do not make the extra commands
// more than their share.
func (h *hedger) moved() { h.tokens = max(h.tokens-1, -hedgeDebt) }

// limit is a time that is hardly ever needed: twice the p99 of what is.
type limit struct {
	after time.Duration
	most  time.Duration // longest that after becomes
	times latency
	fresh int // times noted since after was worked out
}

func newLimit(most time.Duration) limit { return limit{after: min(hedgeFloor, most), most: most} }

// took notes how long it took this time. One that took very long counts as a few
// times the limit, so that the end of a freeze does not switch hedging off.
func (l *limit) took(d time.Duration) {
	l.times.add(min(d, 4*l.after))
	if l.fresh++; l.fresh >= min(hedgeRefresh, 1+int(l.times.total)/2) { // soon, while little is known
		l.fresh = 0
		l.after = min(max(2*l.times.quantile(0.99), hedgeFloor), l.most)
	}
}

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
	slow := g.hedge.slow[d.effort].after * time.Duration(d.items)
	what, again = needAway, g.hedge.quiet.after
	for _, a := range d.live {
		if a == nil || a.gone == nil { // nil: it is known to be silent
			continue
		}
		hangs, next := g.strikeLocked(a.l, a.began, now)
		if hangs {
			continue
		}
		if left := slow - now.Sub(a.began); left > 0 || d.hedged {
			what = needNothing
			if !d.hedged {
				next = min(next, left)
			}
		} else if what == needAway {
			what = needHedge
		}
		again = min(again, next)
	}
	return what, max(again, time.Millisecond)
}

// strikeLocked reports whether a member seems to hang, to whom a command was sent
// some time ago, and if not, when it might. A member that has said nothing for a
// while, though others have, gets a strike from each command that it keeps waiting;
// with its first answer they are forgotten. So that there is something to go by when
// nobody has asked anything else, it is probed, and the others too.
func (g *Group) strikeLocked(l *link, sent, now time.Time) (hangs bool, next time.Duration) {
	since, quiet := sent, g.hedge.quiet.after
	if l.heard.After(since) {
		since = l.heard
	}
	if silence := now.Sub(since); silence < quiet {
		return false, quiet - silence
	}
	if l.strikes < strikesOut {
		g.probeLocked(l, now)
		if g.answersLocked(l, since) {
			l.strikes++
		} else {
			g.probeOthersLocked(l, now)
		}
	}
	return l.strikes >= strikesOut, quiet / strikesOut // a lone command has to look that often
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

// probeOthersLocked probes the members that could take a command from another one.
func (g *Group) probeOthersLocked(but *link, now time.Time) {
	for _, m := range g.members {
		if l := m.link; l != but && (m.state == api.MemberActive || m.state == api.MemberStandby) {
			g.probeLocked(l, now)
		}
	}
}
