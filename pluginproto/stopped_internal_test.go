package pluginproto

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestAProcessThatWasStoppedItselfGivesTheDriverItsTimeAgain(t *testing.T) {
	const timeout, most = 20 * time.Second, 10 * time.Minute
	for _, c := range []struct {
		name  string
		late  time.Duration // the timer fired
		since time.Duration // the command was asked, without that
		want  string        // "" when it goes on
	}{
		{"the timer fired in time", 0, timeout, "no answer and no sign of life"},
		{"the timer fired in time, at the cap", 0, most, "10m0s"},
		{"a heartbeat has just come", -timeout, timeout, ""},
		{"this process was stopped for a minute", time.Minute, timeout, ""},
		{"this process was stopped for an hour", time.Hour, timeout, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := &commandClient{opts: ClientOptions{CommandTimeout: timeout, Cap: most}}
				now := time.Now()
				w := &call{timer: time.NewTimer(time.Hour), due: now.Add(-c.late), since: now.Add(-c.since - max(c.late, 0))}
				defer w.timer.Stop()
				err := client.lateness(w)
				if (err == nil) != (c.want == "") || (err != nil && !strings.Contains(err.Error(), c.want)) {
					t.Fatalf("got %v, want %q", err, c.want)
				}
				if c.late <= 0 {
					return
				}
				<-w.timer.C
				if err := client.lateness(w); err == nil {
					t.Error("a driver that is silent after that too has more time still")
				}
			})
		})
	}
}
