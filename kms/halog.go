package kms

import (
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

// history is the newest events, at most maxRemembered.
type history struct {
	events []api.Event // a ring as soon as it is full
	next   int         // where the oldest is then
}

func (h *history) add(e api.Event) {
	if len(h.events) < maxRemembered {
		h.events = append(h.events, e)
		return
	}
	h.events[h.next] = e
	h.next = (h.next + 1) % maxRemembered
}

func (h *history) last(n int) []api.Event {
	all := slices.Concat(h.events[h.next:], h.events[:h.next])
	if n > 0 && n < len(all) {
		all = all[len(all)-n:]
	}
	return all
}

// memorable reports whether an event belongs to the history of a group: not what is
// done to keys, which the audit log has, and not how far a sync is, only its end.
func memorable(e api.Event) bool {
	switch e.Type {
	case api.EventKey, api.EventDropped:
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
			return e.From != string(api.MemberDown)
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
