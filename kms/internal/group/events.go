package group

import (
	"kmsd/kms/api"
)

// tellLocked puts an event in the queue. Whoever listens is called without a lock.
func (g *Group) tellLocked(e api.Event) {
	g.events = append(g.events, e)
	select {
	case g.told <- struct{}{}:
	default:
	}
}

// announce passes events on, one at a time and in order, until the group is
// closed and nothing is left to tell.
func (g *Group) announce() {
	for last := false; ; {
		g.mu.Lock()
		events := g.events
		g.events = nil
		g.mu.Unlock()
		for _, e := range events {
			g.log(e)
			g.cfg.OnEvent(e)
		}
		if last {
			return
		}
		select {
		case <-g.told:
		case <-g.quiet:
			last = true
		}
	}
}

func (g *Group) log(e api.Event) {
	args := []any{"group", e.Group, "from", e.From, "to", e.To, "ckr", e.CKR, "cause", e.Cause}
	if e.Member != "" {
		args = append([]any{"member", e.Member}, args...)
	}
	log := g.cfg.Logger.Warn
	switch e.To {
	case string(api.MemberActive), string(api.MemberStandby), string(api.MemberSyncing), string(api.GroupNormal):
		log = g.cfg.Logger.Info
	}
	log(e.Type+" is "+e.To, args...)
}
