package group_test

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// logged makes a group log into a buffer, to be read when the group is closed.
func logged(to *bytes.Buffer) func(*group.Config) {
	return func(c *group.Config) {
		c.Logger = hclog.New(&hclog.LoggerOptions{Output: to, Level: hclog.Debug, DisableTime: true})
	}
}

func TestANormalStartAndACleanStopAreQuiet(t *testing.T) {
	for _, idle := range []time.Duration{0, 1900 * time.Millisecond, 2 * time.Second} { // before, at and after a probe
		synctest.Test(t, func(t *testing.T) {
			var log bytes.Buffer
			r := newRig(t, []string{"a", "b", "s*"}, logged(&log)).start()
			r.wantGroup(api.GroupNormal)
			elapse(idle)
			before := len(r.path("a"))
			r.Close()
			for name, h := range r.hsms {
				if _, connections, _ := h.count(); connections != 1 || h.logouts != 1 {
					t.Errorf("%s was connected %d times and logged out %d times, want once each", name, connections, h.logouts)
				}
			}
			if path := r.path("a"); len(path) != before {
				t.Errorf("closing is told as %v", path[before:])
			}
			if s := r.Status(); s.State != api.GroupLost || s.Members[0].State != api.MemberDown || s.Members[0].Reason != "the group is closed" {
				t.Errorf("the closed group shows %+v", s)
			}
			for line := range strings.Lines(log.String()) {
				if !strings.HasPrefix(line, "[INFO]") {
					t.Errorf("logged %s", line)
				}
			}
			if n := strings.Count(log.String(), "group closed"); n != 1 {
				t.Errorf("the close was logged %d times", n)
			}
		})
	}
}

func TestCloseDoesNotWaitForHSMsThatHang(t *testing.T) {
	for _, c := range []struct {
		name   string
		frozen time.Duration // before Close
		want   time.Duration
	}{
		{"one that is known to be silent is killed at once", 5 * time.Second, 0},
		{"one that has just frozen gets the time for a logout", 0, 2 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, three, nil).start()
				r.hsms["b"].freeze()
				elapse(c.frozen)
				began := time.Now()
				r.Close()
				if took := time.Since(began); took != c.want {
					t.Errorf("closing took %v, want %v", took, c.want)
				}
				if r.hsms["a"].logouts != 1 || r.hsms["b"].logouts != 0 {
					t.Error("not the sound members, and they alone, were logged out")
				}
			})
		})
	}
}

func TestNothingIsConnectedWhileTheGroupCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		connecting := make(chan struct{})
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) {
			connect := c.Members[1].Connect
			c.Members[1].Connect = func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
				close(connecting) // once: a second attempt would panic
				<-ctx.Done()
				return connect(ctx) // too late
			}
		})
		go func() { _ = r.Start(context.Background()) }()
		<-connecting
		r.Close()
		late := r.hsms["b"].conns[0]
		select {
		case <-late.Done():
		default:
			t.Error("a driver that came after the close was left running")
		}
	})
}
