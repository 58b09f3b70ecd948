package group

import (
	"time"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// Status returns the truth about the group, from memory. How many keys there are,
// and who holds them, is left for whoever keeps keys to fill in.
func (g *Group) Status() api.Group {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := api.Group{
		Name: g.cfg.Name, State: g.state, MinCopies: g.cfg.MinCopies,
		Members: make([]api.Member, 0, len(g.members)),
	}
	if p := g.primaryLocked(0); p != nil {
		s.Primary = p.cfg.Name
	}
	for _, m := range g.members {
		s.Members = append(s.Members, m.statusLocked())
	}
	return s
}

func (m *member) statusLocked() api.Member {
	s := api.Member{
		Name: m.cfg.Name, Driver: m.cfg.Driver, Role: api.RoleActive,
		State: m.state, CKR: pluginproto.CKRName(m.ckr), Since: m.since, Reason: m.reason,
		Commands: m.commands, Errors: m.errors,
		LatencyP50:       m.times.quantile(0.50).Microseconds(),
		LatencyP99:       m.times.quantile(0.99).Microseconds(),
		Latency:          m.answers,
		RecoveryAttempts: m.attempts,
		GaveUp:           m.gaveUp,
		AttemptsTotal:    m.attemptsTotal,
		Token: api.Token{
			Label: m.token.Label, Serial: m.token.Serial, Manufacturer: m.token.Manufacturer,
			Model: m.token.Model, Firmware: m.token.Firmware, Facts: factsOf(m.token.Facts),
		},
	}
	if m.standby {
		s.Role = api.RoleStandby
	}
	if !m.nextTry.IsZero() {
		next := m.nextTry.Round(time.Millisecond)
		s.NextRecovery = &next
	}
	if m.link != nil {
		s.InFlight, s.DriverPID = m.link.inFlight, m.link.conn.PID()
	}
	return s
}
