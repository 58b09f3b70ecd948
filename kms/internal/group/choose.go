package group

import (
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group/scheduler"
	"kmsd/pluginproto"
)

// set is a set of members, by index.
type set uint32

func (s set) has(m *member) bool { return s&(1<<m.index) != 0 }
func (s *set) add(m *member)     { *s |= 1 << m.index }

// grace is how long a command waits for a member that is just coming back, when
// nobody else can serve.
const grace = 2 * time.Second

// chooseLocked returns the least busy link that may serve, on a member neither in
// failed nor in skip: of an active member, of a standby when no member is active or
// all active ones have failed the caller, and, if lastResort, of one that has
// stopped answering when nobody is in step. Nil: none.
func (g *Group) chooseLocked(failed, skip set, lastResort bool) *link {
	wanted := api.MemberStandby
	for _, m := range g.members {
		if m.state == api.MemberActive && !failed.has(m) {
			wanted = api.MemberActive
			break
		}
	}
	if l := g.leastBusyLocked(wanted, failed|skip); l != nil || !lastResort || g.state != api.GroupLost {
		return l
	}
	return g.leastBusyLocked(api.MemberProbing, failed|skip)
}

func (g *Group) leastBusyLocked(state api.MemberState, tried set) *link {
	var buf [maxMembers]int
	loads := buf[:len(g.members)]
	for i, m := range g.members {
		loads[i] = scheduler.Away
		if m.state == state && m.link != nil && m.link.entered && !tried.has(m) {
			loads[i] = m.link.load
		}
	}
	at := scheduler.Pick(loads, g.turn)
	if at < 0 {
		return nil
	}
	g.turn = (at + 1) % len(loads)
	return g.members[at].link
}

// primaryLocked is the member that key operations begin on: the first active one,
// else the first standby. Nil: none.
func (g *Group) primaryLocked(tried set) *member {
	for _, state := range []api.MemberState{api.MemberActive, api.MemberStandby} {
		for _, m := range g.members {
			if m.state == state && !tried.has(m) {
				return m
			}
		}
	}
	return nil
}

// returningLocked reports whether somebody who was lost a moment ago, or is
// being brought in step, may be back before a caller would rather have an error.
func (g *Group) returningLocked(now time.Time) bool {
	for _, m := range g.members {
		switch {
		case m.state == api.MemberSyncing:
			return true
		case m.state == api.MemberFailed || m.link != nil || g.cfg.Recovery.Manual:
		case !m.lostAt.IsZero() && now.Sub(m.lostAt) < grace:
			return true
		}
	}
	return false
}

// lossLocked is the error for a caller whom no member could serve. As with Luna,
// those who were there when the group was lost, and the first one after, get
// CKR_DEVICE_ERROR.
func (g *Group) lossLocked(last error) error {
	e := &lostError{group: g.cfg.Name, ckr: pluginproto.CKRTokenNotPresent, last: last}
	if last != nil || !g.lossTold {
		e.ckr = pluginproto.CKRDeviceError
	}
	g.lossTold = true
	return e
}
