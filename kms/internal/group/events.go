package group

import (
	"slices"

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
	log := g.cfg.Logger.Info
	if worse(e) {
		log = g.cfg.Logger.Warn
	}
	log(e.Type+" is "+e.To, args...)
}

// worse reports whether a transition is a failure's, and not a step of a start or a
// recovery.
func worse(e api.Event) bool {
	if e.Type == "group" {
		better := []api.GroupState{api.GroupLost, api.GroupStandbyServing, api.GroupSole, api.GroupDegraded, api.GroupNormal}
		return slices.Index(better, api.GroupState(e.To)) < slices.Index(better, api.GroupState(e.From))
	}
	switch api.MemberState(e.To) {
	case api.MemberDown, api.MemberFailed:
		return true
	case api.MemberProbing: // for the first time, or because it has fallen silent
		return e.From != string(api.MemberDown)
	default:
		return false
	}
}
