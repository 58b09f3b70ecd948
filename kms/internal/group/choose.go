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

// wanted says what a command needs of a member.
type wanted struct {
	key        pluginproto.KeyID // its copy must be sound
	failed     set               // members that have failed the caller
	skip       set               // other members that are out of the question for now
	sound      bool              // one that seems to hang is worse than none
	lastResort bool              // one that has stopped answering is better than none
}

// chooseLocked returns the least busy link that may serve, on a member neither in
// failed nor in skip: of an active member, or of a standby when no member is active, or
// all active ones have failed the caller or seem to hang, and, if lastResort, of one that
// has stopped answering when nobody is in step. A member that seems to hang comes after
// all others. Nil: none.
func (g *Group) chooseLocked(w wanted) *link {
	first, last := api.MemberStandby, api.MemberStandby
	for _, m := range g.members {
		if m.state == api.MemberActive && !w.failed.has(m) && !m.link.bars(w.key) {
			last = api.MemberActive
			if m.link.strikes < strikesOut {
				first = api.MemberActive
			}
		}
	}
	l := g.leastBusyLocked(first, w, strikesOut)
	if l == nil && !w.sound {
		l = g.leastBusyLocked(last, w, strikesOut+1)
	}
	if l != nil || !w.lastResort || g.state != api.GroupLost {
		return l
	}
	return g.leastBusyLocked(api.MemberProbing, w, strikesOut+1)
}

// leastBusyLocked returns the least busy link in a state with fewer strikes than out.
func (g *Group) leastBusyLocked(state api.MemberState, w wanted, out int) *link {
	var buf [maxMembers]int
	loads := buf[:len(g.members)]
	tried := w.failed | w.skip
	for i, m := range g.members {
		loads[i] = scheduler.Away
		if l := m.link; m.state == state && l != nil && l.entered && l.strikes < out && !tried.has(m) && !l.bars(w.key) {
			loads[i] = l.load
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
// else the first standby. One that is still at a key operation whose caller has left
// comes after all others. Nil: none.
func (g *Group) primaryLocked(tried set) *member {
	var occupied *member
	for _, state := range []api.MemberState{api.MemberActive, api.MemberStandby} {
		for _, m := range g.members {
			switch {
			case m.state != state || tried.has(m):
			case !m.link.occupied():
				return m
			case occupied == nil:
				occupied = m
			}
		}
	}
	return occupied
}

// returningLocked reports whether somebody who was lost a moment ago, or is
// being brought in step, may be back before a caller would rather have an error.
func (g *Group) returningLocked(now time.Time) bool {
	for _, m := range g.members {
		switch {
		case m.state == api.MemberSyncing:
			return true
		case m.state == api.MemberFailed || m.drained || m.link != nil || g.cfg.Recovery.Manual:
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
