package group

import "kmsd/kms/api"

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
