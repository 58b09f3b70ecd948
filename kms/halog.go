package kms

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
)

// Log returns the last events of groups and members, oldest first: at most last of
// them, 0 means all that are remembered. It comes from memory, and a new KMS has none.
func (k *KMS) Log(_ context.Context, last int) ([]api.Event, error) {
	if last < 0 {
		return nil, api.NewError(api.CodeBadRequest, fmt.Sprintf("reading the log: %d is no number of events", last), nil)
	}
	return k.events.last(last), nil
}

// maxAttempts is how many of the remembered events are those of attempts to bring a
// member back that failed: one that is away for a week makes thousands, and must not
// push out what happened to the others.
const maxAttempts = maxRemembered / 4

// history is the newest events. The zero value has none.
type history struct {
	count    uint64 // of events that were added
	turns    ring   // at most maxRemembered - maxAttempts
	attempts ring   // at most maxAttempts
}

// ring is the newest of some events, the oldest first from next on.
type ring struct {
	events []numbered
	next   int
}

type numbered struct {
	n uint64 // events before it
	api.Event
}

func (h *history) add(e api.Event) {
	one := numbered{h.count, e}
	h.count++
	if staysAway(e) {
		h.attempts.add(one, maxAttempts)
	} else {
		h.turns.add(one, maxRemembered-maxAttempts)
	}
}

func (r *ring) add(e numbered, most int) {
	if len(r.events) < most {
		r.events = append(r.events, e)
		return
	}
	r.events[r.next] = e
	r.next = (r.next + 1) % most
}

func (h *history) last(n int) []api.Event {
	all := slices.Concat(h.turns.events, h.attempts.events)
	slices.SortFunc(all, func(a, b numbered) int { // what a group tells comes a moment after what is found out on a member
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.n, b.n))
	})
	if n > 0 && n < len(all) {
		all = all[len(all)-n:]
	}
	events := make([]api.Event, len(all))
	for i, e := range all {
		events[i] = e.Event
	}
	return events
}

// staysAway reports whether an event is of an attempt with a member that was away
// before and is after it.
func staysAway(e api.Event) bool {
	away := []string{string(api.MemberDown), string(api.MemberProbing), string(api.MemberSyncing), string(api.MemberFailed)}
	switch {
	case e.Alarm:
		return false
	case e.Type == api.EventRecovery:
		return e.To == "failed"
	default:
		return e.Type == api.EventMember && slices.Contains(away, e.From) && slices.Contains(away, e.To)
	}
}

// memorable reports whether an event belongs to the history of a group: not what is
// done to keys, which the audit log has, and not how far a sync is, only its end.
func memorable(e api.Event) bool {
	switch e.Type {
	case api.EventKey, api.EventJob, api.EventDropped:
		return false
	case api.EventSync:
		return e.To != api.SyncUnderWay
	default:
		return true
	}
}

// writeHALog writes an event as one line of the HA log. docs/operations.md promises its
// fields: each is in every line, and empty where it says nothing.
func writeHALog(log hclog.Logger, e api.Event) {
	level := hclog.Info
	switch {
	case e.Alarm:
		level = hclog.Error
	case worse(e):
		level = hclog.Warn
	}
	log.Log(level, strings.TrimSpace(e.Type+" "+e.To),
		"time", e.Time.Format(time.RFC3339Nano), "group", e.Group, "member", e.Member, "key", e.Key,
		"from", e.From, "to", e.To, "ckr", e.CKR, "cause", e.Cause, "alarm", e.Alarm)
}

// byService are the states of a group, the best last.
var byService = []api.GroupState{ // never written to
	api.GroupLost, api.GroupStandbyServing, api.GroupSole, api.GroupDegraded, api.GroupNormal,
}

// worse reports whether an event is a failure's, and not a step of a start or a
// recovery.
func worse(e api.Event) bool {
	switch e.Type {
	case api.EventGroup:
		return slices.Index(byService, api.GroupState(e.To)) < slices.Index(byService, api.GroupState(e.From))
	case api.EventMember:
		switch api.MemberState(e.To) {
		case api.MemberDown, api.MemberFailed:
			return true
		case api.MemberProbing: // for the first time, or because it has fallen silent
			return e.From != string(api.MemberDown) && e.From != string(api.MemberDraining)
		case api.MemberDraining: // its driver ended meanwhile
			return e.From == e.To
		}
	case api.EventRecovery:
		return e.CKR != "" && e.CKR != "CKR_OK"
	case api.EventSync:
		return e.To == api.SyncBroken
	}
	return false
}

// clip shortens a text to a number of bytes.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}
