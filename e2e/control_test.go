package e2e_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"kmsd/e2e/look"
	"kmsd/kms/client"
)

// What kmsd gives an HSM and itself unless it is told otherwise. Whoever waits for one of
// them waits as long on every machine, so that these are what a time is compared with,
// beside what something that needs no HSM took in the meantime.
const (
	probeInterval  = 2 * time.Second        // in which an HSM has to say something
	commandTimeout = 20 * time.Second       // for an answer
	lostPause      = 500 * time.Millisecond // longest between two attempts while nobody serves
	lostGrace      = 2 * time.Second        // for a member to come back, after the last was lost
)

// recoveredIn is how long tests wait for what has to happen. It is no promise, and far more
// than any machine needs; where there is a promise, a test compares.
const recoveredIn = 2 * time.Minute

// share is how many times as long as its control something may take. What passes several
// processes is delayed in each of them, what needs no HSM in one.
const share = 4

// startControl begins with requests that no HSM has a part in.
func startControl(t *testing.T, c *client.Client, key string) *openLoad {
	t.Helper()
	return startOpenLoad(t, &openLoad{c: c, key: key, send: (*openLoad).read, interval: 10 * time.Millisecond})
}

// read looks at the key.
func (l *openLoad) read(due time.Time) {
	_, err := l.c.Key(context.Background(), l.key)
	l.record(due, "read", err)
}

// stall is how requests ended, and beside them those that no HSM has a part in.
type stall struct {
	wraps, control outcome
	// before is how wraps ended until then. A request goes to a second member when it takes
	// twice as long as nearly all of these did, and what has hung its member delays the
	// next one as long again.
	before outcome
}

func (s stall) String() string {
	return fmt.Sprintf("%v; without an HSM within %v (99 %%), %v (all)", s.wraps, s.control.quantile(0.99), s.control.quantile(1))
}

// waited returns whether a request took longer than the limit and the machine is not to
// blame.
func (s stall) waited(limit time.Duration) bool {
	return s.wraps.quantile(1) > limit+share*(s.control.quantile(1)+s.before.quantile(0.99))
}

// noneWaited fails the test when a request waited.
func (s stall) noneWaited(t *testing.T, limit time.Duration) {
	t.Helper()
	if s.waited(limit) {
		t.Errorf("a request took %v, want at most %v; what needs no HSM took at most %v, and wraps took %v before (99 %%)",
			s.wraps.quantile(1), limit, s.control.quantile(1), s.before.quantile(0.99))
	}
}

// startOpening has drivers of the test's own open the token of a member, one after the
// other, as kmsd's does when it brings the member back. stop returns the times; there is
// at least one.
func startOpening(t *testing.T, cfg look.Config, member string) (stop func() outcome) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	opened := make(chan outcome, 1)
	go func() {
		var o outcome
		for len(o.times) == 0 || ctx.Err() == nil {
			begin := time.Now()
			_, end, err := look.OpenToken(t.Context(), bin, cfg, member)
			o.times = append(o.times, time.Since(begin))
			if err != nil {
				o.failures = append(o.failures, err)
				break
			}
			end()
		}
		opened <- o
	}()
	return func() outcome {
		t.Helper()
		cancel()
		o := <-opened
		o.noFailure(t)
		return o
	}
}
