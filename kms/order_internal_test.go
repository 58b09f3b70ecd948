package kms

import (
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
)

// A group tells of its members from a goroutine of its own, which may come after what an
// admission has found.
func TestTheLogIsInTheOrderOfWhatHappened(t *testing.T) {
	h := newHub(hclog.NewNullLogger())
	began := time.Now()
	h.publish(api.Event{Type: api.EventSync, To: api.SyncDone, Time: began.Add(time.Second)})
	h.publish(api.Event{Type: api.EventMember, To: "syncing", Time: began})
	h.publish(api.Event{Type: api.EventMember, To: "active", Time: began.Add(time.Second)}) // at the same time, and told later
	for n, want := range map[int][]string{0: {"syncing", api.SyncDone, "active"}, 2: {api.SyncDone, "active"}} {
		got := h.last(n)
		if len(got) != len(want) {
			t.Fatalf("the last %d are %+v, want %v", n, got, want)
		}
		for i, e := range got {
			if e.To != want[i] {
				t.Errorf("of the last %d, event %d is %q, want %q", n, i, e.To, want[i])
			}
		}
	}
}
