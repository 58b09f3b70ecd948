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
	reached     happening = "reached"          // an attempt to bring it back began
	opened      happening = "opened"           // its driver runs, its token is open and works
	admitted    happening = "admitted"         // it holds what it should
	onStand     happening = "put on standby"   // the same, for a member that stands by
	silent      happening = "fell silent"      // it owes an answer and gives none
	answered    happening = "answered"         // it gives answers again
	lost        happening = "lost"             // it was in the group, and its driver ended or had to be ended
	missed      happening = "not brought back" // an attempt failed
	refused     happening = "refused"          // an attempt or a member failed, and trying again will not mend it
	madeStandby happening = "made a standby"   // by the operator
	madeActive  happening = "made active"      // by the operator
	drained     happening = "drained"          // by the operator, while its driver ran
	parked      happening = "parked"           // by the operator, while no driver ran
	resumed     happening = "resumed"          // the operator ended the drain
)

// shown is which CKR status shows for a member after something happened.
type shown string

const (
	asBefore shown = "as before"
	healthy  shown = "CKR_OK"
	// As with Luna, a loss is CKR_DEVICE_ERROR when it is first reported and
	// CKR_TOKEN_NOT_PRESENT from the first attempt on, until the member is back. What the
	// library said stays in the reason.
	firstReport  shown = "CKR_DEVICE_ERROR"
	laterReports shown = "CKR_TOKEN_NOT_PRESENT"
	// A failure that lasts is shown as the library named it, CKR_PIN_INCORRECT for one,
	// and as before, or CKR_DEVICE_ERROR, when it said nothing.
	itsOwn shown = "the library's"
)

type situation struct {
	from api.MemberState
	what happening
}

type consequence struct {
	to  api.MemberState
	ckr shown
}

// transitions is all that can happen to a member. What is not in it does not
// change the state.
var transitions = map[situation]consequence{ // never written to
	{api.MemberDown, reached}: {api.MemberProbing, laterReports},
	{api.MemberDown, parked}:  {api.MemberDraining, laterReports},

	{api.MemberFailed, opened}:  {api.MemberSyncing, laterReports},
	{api.MemberFailed, missed}:  {api.MemberDown, laterReports},
	{api.MemberFailed, refused}: {api.MemberFailed, itsOwn}, // perhaps for another reason
	{api.MemberFailed, parked}:  {api.MemberDraining, laterReports},

	{api.MemberProbing, opened}:   {api.MemberSyncing, asBefore},
	{api.MemberProbing, answered}: {api.MemberSyncing, asBefore},
	{api.MemberProbing, lost}:     {api.MemberDown, firstReport},
	{api.MemberProbing, missed}:   {api.MemberDown, laterReports},
	{api.MemberProbing, refused}:  {api.MemberFailed, itsOwn},
	{api.MemberProbing, drained}:  {api.MemberDraining, asBefore},
	{api.MemberProbing, parked}:   {api.MemberDraining, laterReports},

	{api.MemberSyncing, admitted}: {api.MemberActive, healthy},
	{api.MemberSyncing, onStand}:  {api.MemberStandby, healthy},
	{api.MemberSyncing, silent}:   {api.MemberProbing, asBefore},
	{api.MemberSyncing, lost}:     {api.MemberDown, firstReport},
	{api.MemberSyncing, missed}:   {api.MemberDown, laterReports},
	{api.MemberSyncing, refused}:  {api.MemberFailed, itsOwn},
	{api.MemberSyncing, drained}:  {api.MemberDraining, asBefore},

	{api.MemberActive, silent}:      {api.MemberProbing, firstReport},
	{api.MemberActive, lost}:        {api.MemberDown, firstReport},
	{api.MemberActive, refused}:     {api.MemberFailed, itsOwn},
	{api.MemberActive, madeStandby}: {api.MemberStandby, asBefore},
	{api.MemberActive, drained}:     {api.MemberDraining, asBefore},

	{api.MemberStandby, silent}:     {api.MemberProbing, firstReport},
	{api.MemberStandby, lost}:       {api.MemberDown, firstReport},
	{api.MemberStandby, refused}:    {api.MemberFailed, itsOwn},
	{api.MemberStandby, madeActive}: {api.MemberActive, asBefore},
	{api.MemberStandby, drained}:    {api.MemberDraining, asBefore},

	{api.MemberDraining, resumed}: {api.MemberSyncing, asBefore},
	{api.MemberDraining, reached}: {api.MemberProbing, laterReports},  // the drain has ended
	{api.MemberDraining, lost}:    {api.MemberDraining, laterReports}, // nobody brings it back, so this is the only report
	{api.MemberDraining, missed}:  {api.MemberDraining, laterReports},
	{api.MemberDraining, refused}: {api.MemberFailed, itsOwn},
}

// moveLocked carries out what happened to a member and tells of it. cause is nil
// for what is no failure; the last failure stays on show until the member serves.
// In a group that is closing, and to a member that has left, nothing happens any more.
func (g *Group) moveLocked(m *member, what happening, cause error) {
	if g.closed || m.left {
		return
	}
	from := m.state
	next, ok := transitions[situation{from, what}]
	if !ok {
		return
	}
	to, why := next.to, string(what)
	switch {
	case cause != nil:
		why = cause.Error()
		if to == from && why == m.reason {
			return // nothing new
		}
		m.reason = why
	case to == api.MemberActive || to == api.MemberStandby:
		m.reason = ""
	}
	m.ckr = ckrAfter(next.ckr, m.ckr, cause)
	now := time.Now()
	if to != from {
		m.state, m.since = to, now
	}
	g.tellLocked(api.Event{
		Time: now, Type: api.EventMember, Group: g.cfg.Name, Member: m.cfg.Name,
		From: string(from), To: string(to), CKR: pluginproto.CKRName(m.ckr), Cause: why,
		Alarm: to == api.MemberFailed,
	})
	g.regroupLocked(now, m.cfg.Name)
}

// ckrAfter is the CKR that status shows for a member after something happened.
func ckrAfter(show shown, before uint, cause error) uint {
	switch show {
	case healthy:
		return pluginproto.CKROK
	case firstReport:
		return pluginproto.CKRDeviceError
	case laterReports:
		return pluginproto.CKRTokenNotPresent
	case itsOwn:
		if own := pluginproto.CKROf(cause); own != pluginproto.CKROK {
			return own
		}
		if before == pluginproto.CKROK {
			return pluginproto.CKRDeviceError
		}
	}
	return before
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
		Time: now, Type: api.EventGroup, Group: g.cfg.Name, From: string(from), To: string(to),
		CKR: pluginproto.CKRName(pluginproto.CKROK), Cause: "member " + member + " changed its state",
	}
	if to == api.GroupLost {
		e.CKR, e.Alarm = pluginproto.CKRName(pluginproto.CKRDeviceError), true
	}
	g.tellLocked(e)
}

// stateLocked is the state of the group, by the states of its members. One that is
// drained counts as one that is away; one that has not joined yet does not count.
func (g *Group) stateLocked() api.GroupState {
	var active, standby, all int
	for _, m := range g.members {
		if m.joining {
			continue
		}
		all++
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
	case active+standby == all:
		return api.GroupNormal
	case active == 1:
		return api.GroupSole
	default:
		return api.GroupDegraded
	}
}

// lossOf says how a member is lost with a failure: for now, or until something
// outside has changed.
func lossOf(cause error, entered bool) happening {
	switch {
	case permanent(cause):
		return refused
	case entered:
		return lost
	default:
		return missed
	}
}

// permanent reports whether a failure will not mend by itself.
func permanent(cause error) bool {
	e := (*pluginproto.Error)(nil)
	return errors.As(cause, &e) && e.Permanent
}
