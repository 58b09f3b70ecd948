package replica

import (
	"fmt"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// namedAlarms is how many keys of one member get an alarm of their own; the rest share
// one.
const namedAlarms = 10

// tellProgress passes on how far a member has come.
func (a *Admission) tellProgress(member string, p api.Progress) {
	a.events(api.Event{
		Type: api.EventSync, Member: member, To: api.SyncUnderWay, Progress: &p,
		Cause: fmt.Sprintf("%d of %d done, %.0f per second, %v left", p.Done, p.Total, p.Rate, time.Duration(p.Left)),
	})
}

// tellEnd says how the bulk of an admission has ended, when there was anything to do.
func (a *Admission) tellEnd(member string, s *Sync, err error) {
	p, any := s.meter.progress()
	if !any {
		return
	}
	e := api.Event{Type: api.EventSync, Member: member, To: api.SyncDone, Progress: &p,
		Cause: fmt.Sprintf("%d of %d done", p.Done, p.Total)}
	if err != nil {
		e.To = api.SyncBroken
		e.Cause += "; broken off, the next attempt does the rest: " + err.Error()
	}
	a.events(e)
}

// tellFound says what was unusual about an admission: in one line of the log, and
// as events for what was not so at the last one.
func (a *Admission) tellFound(member string, held int, before, r Report) {
	a.tellQuarantined(member, before, r)
	if len(r.Refused) > 0 {
		a.alarm(member, "", fmt.Sprintf("it serves without what it has refused, which is tried again now and then: %v", refusals(r.Refused)))
	}
	if n := len(r.Foreign); n > len(before.Foreign) {
		a.events(api.Event{Type: api.EventSync, Member: member, Cause: fmt.Sprintf(
			"it holds %d keys that nobody here knows, for example %s; they are left alone: kmsd group sync --adopt takes them in", n, describe(r.Foreign[0]))})
	}
	if r.Cloned+r.Changed+len(r.Destroyed)+len(r.Missing)+len(r.Quarantined)+len(r.Foreign) == 0 {
		return
	}
	level := hclog.Info
	if len(r.Missing)+len(r.Quarantined) > 0 {
		level = hclog.Warn
	}
	a.log.Log(level, "member compared with the catalog", "member", member, "held", held, "cloned", r.Cloned, "changed", r.Changed,
		"destroyed", len(r.Destroyed), "missing", len(r.Missing), "quarantined", len(r.Quarantined), "foreign", len(r.Foreign))
}

// tellQuarantined raises an alarm for each copy that was not in quarantine before.
func (a *Admission) tellQuarantined(member string, before, r Report) {
	known := make(map[pluginproto.KeyID]bool)
	for _, w := range before.Quarantined {
		known[w.ID] = true
	}
	told := 0
	for _, w := range r.Quarantined {
		if known[w.ID] {
			continue
		}
		if told++; told <= namedAlarms {
			a.alarm(member, w.Key, fmt.Sprintf("another key under a known identity: %v (object %s); it is quarantined, never used and never overwritten: "+
				"find out which is right, then remove the wrong object and run kmsd group sync, or run kmsd member replace %s", w.matches(w.Found), w.ID, member))
		}
	}
	if more := told - namedAlarms; more > 0 {
		a.alarm(member, "", fmt.Sprintf("%d more copies are quarantined", more))
	}
}

func (a *Admission) alarm(member, key, cause string) {
	a.events(api.Event{Type: api.EventSync, Member: member, Key: key, Cause: cause, Alarm: true})
}

func describe(o pluginproto.Object) string {
	return fmt.Sprintf("%s (%s, label %q)", o.ID, o.Type, o.Label)
}
