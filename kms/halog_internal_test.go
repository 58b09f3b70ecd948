package kms

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
)

func TestHistoryKeepsTheNewestEventsOfGroupsAndMembers(t *testing.T) {
	h := newHub(hclog.NewNullLogger())
	k := &KMS{events: h}
	if past, err := k.Log(t.Context(), 0); len(past) != 0 || err != nil {
		t.Errorf("the log of a new service is %v, %v", past, err)
	}
	const told, kept = maxRemembered + 100, maxRemembered - maxAttempts
	for i := range told {
		h.publish(api.Event{Type: api.EventMember, Member: "hsm-a", Cause: fmt.Sprint(i)})
		h.publish(api.Event{Type: api.EventKey, Key: "shop", Cause: fmt.Sprint(i)})
		h.publish(api.Event{Type: api.EventSync, Member: "hsm-a", To: api.SyncUnderWay, Progress: &api.Progress{Done: 1, Total: 2}})
	}
	for _, c := range []struct {
		name             string
		last             int
		want, first, end int
	}{
		{"all that are remembered", 0, kept, told - kept, told - 1},
		{"the last three", 3, 3, told - 3, told - 1},
		{"more than there are", 5000, kept, told - kept, told - 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			past, err := k.Log(t.Context(), c.last)
			if err != nil || len(past) != c.want {
				t.Fatalf("got %d events, want %d; %v", len(past), c.want, err)
			}
			if first, end := past[0].Cause, past[c.want-1].Cause; first != fmt.Sprint(c.first) || end != fmt.Sprint(c.end) {
				t.Errorf("events %s to %s, want %d to %d", first, end, c.first, c.end)
			}
			if !slices.IsSortedFunc(past, func(a, b api.Event) int { return a.Time.Compare(b.Time) }) {
				t.Error("not the oldest first")
			}
		})
	}
	h.publish(api.Event{Type: api.EventSync, To: api.SyncBroken, Progress: &api.Progress{Done: 1, Total: 2}})
	if past, _ := k.Log(t.Context(), 1); past[0].Type != api.EventSync {
		t.Error("the end of a sync is not remembered")
	}
	if _, err := k.Log(context.Background(), -1); err == nil || err.(*api.Error).Code != api.CodeBadRequest {
		t.Errorf("the last -1 events: %v", err)
	}
}

func TestAMemberThatIsAwayDoesNotPushOutWhatHappenedToOthers(t *testing.T) {
	h := newHub(hclog.NewNullLogger())
	h.publish(api.Event{Type: api.EventMember, Member: "hsm-a", From: "active", To: "down"})
	const attempts = 10 * maxRemembered
	for i := range attempts {
		h.publish(api.Event{Type: api.EventMember, Member: "hsm-a", From: "down", To: "probing"})
		h.publish(api.Event{Type: api.EventMember, Member: "hsm-a", From: "probing", To: "down"})
		h.publish(api.Event{Type: api.EventRecovery, Member: "hsm-a", To: "failed", Cause: fmt.Sprint(i)})
		if i == attempts/2 {
			h.publish(api.Event{Type: api.EventRecovery, Member: "hsm-b", To: "given up", Alarm: true})
		}
	}
	past := h.last(0)
	if len(past) != maxAttempts+2 || past[0].From != "active" || !past[1].Alarm {
		t.Errorf("%d events are remembered, first %+v, %+v", len(past), past[0], past[1])
	}
	if newest := past[len(past)-1]; newest.Cause != fmt.Sprint(attempts-1) {
		t.Errorf("the newest attempt is %q", newest.Cause)
	}
}

func TestWhatADriverSaysIsKeptInPart(t *testing.T) {
	h := newHub(hclog.NewNullLogger())
	h.publish(api.Event{Type: api.EventMember, Cause: strings.Repeat("x", maxCause-1) + "é" + strings.Repeat("y", 1<<20)})
	if cause, want := h.last(1)[0].Cause, strings.Repeat("x", maxCause-1)+"..."; cause != want {
		t.Errorf("kept %d bytes of the cause, want %d", len(cause), len(want))
	}
}

func TestHALog(t *testing.T) {
	at := time.Date(2026, 11, 21, 3, 4, 5, 678000000, time.FixedZone("", 3600))
	for _, c := range []struct {
		name           string
		event          api.Event
		level, message string
	}{
		{"a member that is lost", api.Event{Type: api.EventMember, Group: "g", Member: "a", From: "active", To: "down", CKR: "CKR_DEVICE_ERROR", Cause: "its driver ended"}, "warn", "member down"},
		{"a member that has fallen silent", api.Event{Type: api.EventMember, From: "active", To: "probing"}, "warn", "member probing"},
		{"a member that is being reached", api.Event{Type: api.EventMember, From: "down", To: "probing"}, "info", "member probing"},
		{"a member that is back", api.Event{Type: api.EventMember, From: "syncing", To: "active"}, "info", "member active"},
		{"a group that gets worse", api.Event{Type: api.EventGroup, From: "normal", To: "degraded"}, "warn", "group degraded"},
		{"a group that gets better", api.Event{Type: api.EventGroup, From: "lost", To: "sole"}, "info", "group sole"},
		{"an attempt that failed", api.Event{Type: api.EventRecovery, To: "failed", CKR: "CKR_DEVICE_ERROR"}, "warn", "recovery failed"},
		{"a recovery that nobody goes on with", api.Event{Type: api.EventRecovery, To: "given up", Alarm: true}, "error", "recovery given up"},
		{"the end of a sync", api.Event{Type: api.EventSync, To: api.SyncDone, Progress: &api.Progress{Done: 9, Total: 9}}, "info", "sync synced"},
		{"one that was broken off", api.Event{Type: api.EventSync, To: api.SyncBroken, Progress: &api.Progress{Total: 9}}, "warn", "sync broken_off"},
		{"a copy that is not what it should be", api.Event{Type: api.EventSync, Member: "a", Key: "shop", Cause: "quarantined", Alarm: true}, "error", "sync"},
		{"a token that warns", api.Event{Type: api.EventFact, Member: "a", To: api.FactWarning, Cause: "storage: 97 % used", Alarm: true}, "error", "fact warning"},
		{"one that does so no more", api.Event{Type: api.EventFact, Member: "a", To: api.FactMended, Cause: "storage: 40 % used"}, "info", "fact mended"},
		{"what is done to a key is not in it", api.Event{Type: api.EventKey, Key: "shop", To: "rotated"}, "", ""},
		{"nor how far a sync is", api.Event{Type: api.EventSync, To: api.SyncUnderWay, Progress: &api.Progress{Total: 9}}, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out bytes.Buffer
			c.event.Time = at
			newHub(hclog.New(&hclog.LoggerOptions{Name: "kmsd", Output: &out, JSONFormat: true})).publish(c.event)
			if c.message == "" {
				if out.Len() > 0 {
					t.Errorf("logged %s", out.String())
				}
				return
			}
			var line map[string]any
			if err := json.Unmarshal(out.Bytes(), &line); err != nil {
				t.Fatalf("%v in %s", err, out.String())
			}
			delete(line, "@timestamp")
			want := map[string]any{
				"@level": c.level, "@message": c.message, "@module": "kmsd.ha",
				"time": "2026-11-21T02:04:05.678Z", "group": c.event.Group, "member": c.event.Member, "key": c.event.Key,
				"from": c.event.From, "to": c.event.To, "ckr": c.event.CKR, "cause": c.event.Cause, "alarm": c.event.Alarm,
			}
			if !maps.Equal(line, want) {
				t.Errorf("logged %v\nwant   %v", line, want)
			}
		})
	}
}
