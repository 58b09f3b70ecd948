package group

import (
	"context"
	"fmt"
	"slices"
	"time"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// factsInterval is how often a member in step is asked for the facts of its token. They
// change as slowly as a partition fills or a certificate ages.
const factsInterval = 30 * time.Second

// askLocked has a member asked for the facts of its token when it is time and it is in step
// and not late with anything.
func (g *Group) askLocked(l *link, now time.Time, owed time.Duration) {
	inStep := l.m.state == api.MemberActive || l.m.state == api.MemberStandby
	if !inStep || l.asking || now.Sub(l.asked) < factsInterval || owed >= g.cfg.ProbeInterval/8 || g.closed {
		return
	}
	h := &handle{g: g, l: l, st: l.stint}
	l.asking = true
	g.tasks.Go(func() {
		g.ask(l.ctx, h)
		g.mu.Lock()
		defer g.mu.Unlock()
		l.asking, l.asked = false, time.Now()
	})
}

// AskFacts asks every member in step for the facts of its token, and returns when each has
// answered or ctx ends. Status has the answers.
func (g *Group) AskFacts(ctx context.Context) {
	g.OnEach(ctx, nil, func(ctx context.Context, m Member) error {
		g.ask(ctx, m.(*handle))
		return nil
	})
}

// ask takes in what a token says of itself now. When it says nothing, what it said before
// stands; that its call has failed is known to whoever looks after the member.
func (g *Group) ask(ctx context.Context, h *handle) {
	began := time.Now()
	facts, err := h.Facts(ctx)
	if err != nil {
		g.cfg.Logger.Debug("member was asked for the facts of its token in vain", "group", g.cfg.Name, "member", h.Name(), "error", err)
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if h.l.m.link == h.l && !began.Before(h.l.told) { // else somebody has asked later, and was answered first
		h.l.told = began
		before := h.l.m.token.Facts
		h.l.m.token.Facts = facts
		g.tellFactsLocked(h.l.m, before)
	}
}

// tellFactsLocked tells which facts of a member's token are warnings now and were none
// before, and the other way round.
func (g *Group) tellFactsLocked(m *member, before []pluginproto.Fact) {
	if g.closed || m.left {
		return
	}
	for _, f := range m.token.Facts {
		if f.Warning && !warns(before, f.Name) {
			g.tellFactLocked(m, api.FactWarning, fmt.Sprintf("%s: %s", f.Name, f.Value), true)
		}
	}
	for _, f := range before {
		if !f.Warning || warns(m.token.Facts, f.Name) {
			continue
		}
		cause := f.Name + ": it is told no more"
		if at := slices.IndexFunc(m.token.Facts, func(now pluginproto.Fact) bool { return now.Name == f.Name }); at >= 0 {
			cause = fmt.Sprintf("%s: %s", f.Name, m.token.Facts[at].Value)
		}
		g.tellFactLocked(m, api.FactMended, cause, false)
	}
}

func (g *Group) tellFactLocked(m *member, to, cause string, alarm bool) {
	g.tellLocked(api.Event{
		Time: time.Now(), Type: api.EventFact, Group: g.cfg.Name, Member: m.cfg.Name, To: to, Cause: cause, Alarm: alarm,
	})
}

// warns reports whether a fact of this name is a warning.
func warns(facts []pluginproto.Fact, name string) bool {
	return slices.ContainsFunc(facts, func(f pluginproto.Fact) bool { return f.Warning && f.Name == name })
}

// factsOf shows the facts of a token to users. It shares nothing with them.
func factsOf(facts []pluginproto.Fact) []api.Fact {
	var out []api.Fact
	for _, f := range facts {
		out = append(out, api.Fact{Name: f.Name, Value: f.Value, Warning: f.Warning})
	}
	return out
}
