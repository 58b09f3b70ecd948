package group

import (
	"errors"
	"time"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// happening is what can happen to a member.
type happening string

const (
	reached  happening = "reached"         // an attempt to bring it back began
	opened   happening = "opened"          // its driver runs, its token is open and works
	admitted happening = "admitted"        // it holds what it should
	onStand  happening = "put on standby"  // the same, for a member that stands by
	silent   happening = "fell silent"     // it owes an answer and gives none
	answered happening = "answered"        // it gives answers again
	lost     happening = "lost"            // its driver ended, or had to be ended
	refused  happening = "refused for now" // lost, and trying again will not mend it
)

type situation struct {
	from api.MemberState
	what happening
}

// transitions is all that can happen to a member. What is not in it does not
// change the state.
var transitions = map[situation]api.MemberState{ // never written to
	{api.MemberDown, reached}:  api.MemberProbing,
	{api.MemberFailed, opened}: api.MemberSyncing,
	{api.MemberFailed, lost}:   api.MemberDown,

	{api.MemberProbing, opened}:   api.MemberSyncing,
	{api.MemberProbing, answered}: api.MemberSyncing,
	{api.MemberSyncing, admitted}: api.MemberActive,
	{api.MemberSyncing, onStand}:  api.MemberStandby,

	{api.MemberActive, silent}:  api.MemberProbing,
	{api.MemberStandby, silent}: api.MemberProbing,
	{api.MemberSyncing, silent}: api.MemberProbing,

	{api.MemberActive, lost}:  api.MemberDown,
	{api.MemberStandby, lost}: api.MemberDown,
	{api.MemberSyncing, lost}: api.MemberDown,
	{api.MemberProbing, lost}: api.MemberDown,

	{api.MemberActive, refused}:  api.MemberFailed,
	{api.MemberStandby, refused}: api.MemberFailed,
	{api.MemberSyncing, refused}: api.MemberFailed,
	{api.MemberProbing, refused}: api.MemberFailed,
	{api.MemberFailed, refused}:  api.MemberFailed, // perhaps for another reason
}

// moveLocked carries out what happened to a member and tells of it. cause is nil
// for what is no failure; the last failure stays on show until the member serves.
// In a group that is closing nothing happens any more.
func (g *Group) moveLocked(m *member, what happening, cause error) {
	if g.closed {
		return
	}
	from := m.state
	to, ok := transitions[situation{from, what}]
	if !ok {
		return
	}
	why := string(what)
	switch {
	case cause != nil:
		why = cause.Error()
		if to == from && why == m.reason {
			return // nothing new
		}
		m.reason, m.ckr = why, ckrOfFailure(from, cause)
	case to == api.MemberActive || to == api.MemberStandby:
		m.reason, m.ckr = "", pluginproto.CKROK
	}
	now := time.Now()
	if to != from {
		m.state, m.since = to, now
	}
	g.tellLocked(api.Event{
		Time: now, Type: "member", Group: g.cfg.Name, Member: m.cfg.Name,
		From: string(from), To: string(to), CKR: pluginproto.CKRName(m.ckr), Cause: why,
	})
	g.regroupLocked(now, m.cfg.Name)
}

// ckrOfFailure is the CKR that status shows for a failure. Where the library gave
// none it is the one that Luna shows: first CKR_DEVICE_ERROR, after that
// CKR_TOKEN_NOT_PRESENT.
func ckrOfFailure(from api.MemberState, cause error) uint {
	if ckr := pluginproto.CKROf(cause); ckr != pluginproto.CKROK {
		return ckr
	}
	switch from {
	case api.MemberActive, api.MemberStandby, api.MemberSyncing:
		return pluginproto.CKRDeviceError
	default:
		return pluginproto.CKRTokenNotPresent
	}
}

// regroupLocked works out the state of the group after a member's has changed,
// tells of it, and wakes those who wait for a member.
func (g *Group) regroupLocked(now time.Time, member string) {
	close(g.changed)
	g.changed = make(chan struct{})
	from, to := g.state, g.stateLocked()
	if from == to {
		return
	}
	g.state, g.lossTold = to, false
	e := api.Event{
		Time: now, Type: "group", Group: g.cfg.Name, From: string(from), To: string(to),
		CKR: pluginproto.CKRName(pluginproto.CKROK), Cause: "member " + member + " changed its state",
	}
	if to == api.GroupLost {
		e.CKR = pluginproto.CKRName(pluginproto.CKRDeviceError)
	}
	g.tellLocked(e)
}

// stateLocked is the state of the group, by the states of its members.
func (g *Group) stateLocked() api.GroupState {
	var active, standby int
	for _, m := range g.members {
		switch m.state {
		case api.MemberActive:
			active++
		case api.MemberStandby:
			standby++
		}
	}
	switch {
	case active == 0 && standby == 0:
		return api.GroupLost
	case active == 0:
		return api.GroupStandbyServing
	case active+standby == len(g.members):
		return api.GroupNormal
	case active == 1:
		return api.GroupSole
	default:
		return api.GroupDegraded
	}
}

// lossOf says how a member is lost with a failure: for now, or until something
// outside has changed.
func lossOf(cause error) happening {
	if e := (*pluginproto.Error)(nil); errors.As(cause, &e) && e.Permanent {
		return refused
	}
	return lost
}
