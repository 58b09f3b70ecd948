package e2e_test

import (
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/client"
)

// longestWhileFrozen is within what every request is answered although a member is
// frozen, on a machine that has time for it. With a Luna client it is 20 s.
const longestWhileFrozen = 50 * time.Millisecond

// freezes are how long a member is frozen: it is hardly noticed, it is passed over, it
// is taken out of choice.
var freezes = []time.Duration{100 * time.Millisecond, 500 * time.Millisecond, 2500 * time.Millisecond}

func TestAFrozenDriverIsNotNoticedAndComesBack(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	createKey(t, c, "shop")
	load := startMeasured(t, c, "shop")
	for i, m := range group(t, c).Members { // the first is the primary
		for _, length := range freezes {
			load.withstands(t, m.Name, length)
		}
		pid := awaitMember(t, c, m.Name, recoveredIn, isActive).DriverPID
		thaw := freeze(t, pid)
		frozen := awaitMember(t, c, m.Name, recoveredIn, func(m api.Member) bool { return !isActive(m) })
		t.Logf("%s: %s (%s)", frozen.Name, frozen.State, frozen.Reason)
		createKey(t, c, fmt.Sprintf("made-while-frozen-%d", i))
		thaw()
		_, took := awaitWhole(t, c, recoveredIn)
		t.Logf("%s: active with every key again %v after SIGCONT", m.Name, took)
	}
	load.wraps.end().noneFailed(t, 100)
	allVerify(t, c)
}

// The difference that hedging makes: without it, what is on the frozen member waits
// until that has been silent for a probe interval.
func TestWithoutHedgingAFrozenDriverIsNoticed(t *testing.T) {
	s := start(t)
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	changeConfig(t, s, func(group map[string]any) { group["hedge"] = false })
	c := dial(t, serve(t, s))
	awaitWhole(t, c, recoveredIn)
	createKey(t, c, "shop")
	load := &measured{
		c: c, control: startControl(t, c, "shop"),
		// With an open load as many requests as arrive in 2 s would wait.
		wraps: startPrograms(t, &openLoad{c: c, key: "shop", send: (*openLoad).wrap, interval: 50 * time.Millisecond}, 16),
	}
	stall := load.freeze(t, group(t, c).Members[0].Name, 3*time.Second)
	t.Logf("%v", stall)
	stall.wraps.noneFailed(t, 50)
	if longest := stall.wraps.quantile(1); longest < probeInterval/4 {
		t.Errorf("the longest request took %v although nothing was hedged; the load does not show a freeze", longest)
	}
}

// measured is an open load beside which the machine is measured: requests that no HSM
// has a part in go the same way through the same client, so what delays them is not a
// member.
type measured struct {
	c              *client.Client
	wraps, control *openLoad
	before         []time.Duration // of the newest wraps whose times have been taken
}

// remembered is by how many answers kmsd judges what is slow, at most.
const remembered = 4096

// wrapsPerSecond arrive whatever became of those before them.
const wrapsPerSecond = 500

func startMeasured(t *testing.T, c *client.Client, key string) *measured {
	t.Helper()
	m := &measured{
		c:       c,
		wraps:   startOpenLoad(t, &openLoad{c: c, key: key, send: (*openLoad).wrap, interval: time.Second / wrapsPerSecond}),
		control: startControl(t, c, key),
	}
	settle(t, m.wraps)
	m.control.take()
	return m
}

// begin forgets what was, but for how long wraps took.
func (m *measured) begin(t *testing.T) {
	t.Helper()
	o := m.wraps.begin()
	o.noFailure(t)
	m.remember(o)
	m.control.begin()
}

func (m *measured) remember(o outcome) {
	m.before = append(m.before, o.times...)
	m.before = m.before[max(0, len(m.before)-remembered):]
}

// sinceBegin returns what has happened since begin.
func (m *measured) sinceBegin(t *testing.T) stall {
	t.Helper()
	s := stall{wraps: m.wraps.sinceBegin(t), control: m.control.sinceBegin(t), before: outcome{times: slices.Clone(m.before)}}
	m.remember(s.wraps)
	return s
}

// freeze stops the driver of a member for a while, and returns when all is well again.
func (m *measured) freeze(t *testing.T, member string, length time.Duration) stall {
	t.Helper()
	awaitWhole(t, m.c, recoveredIn)
	pid := awaitMember(t, m.c, member, recoveredIn, isActive).DriverPID
	m.begin(t)
	thaw := freeze(t, pid)
	wait(t, length)
	thaw()
	awaitWhole(t, m.c, recoveredIn)
	return m.sinceBegin(t)
}

// attempts is how often a freeze is tried until the machine has the time to show how
// fast the group is. A wait for a member is there each time; one for a processor is not.
const attempts = 4

// withstands checks that a freeze is not noticed: in no attempt may a request have waited
// until the member is thawed, or has been silent for a probe interval, and one attempt has
// to be as fast as promised.
func (m *measured) withstands(t *testing.T, member string, length time.Duration) {
	t.Helper()
	for range attempts {
		s := m.freeze(t, member, length)
		t.Logf("%s frozen for %v: %v", member, length, s)
		s.wraps.noFailure(t)
		s.noneWaited(t, longestAnswer)
		if !s.waited(longestWhileFrozen) {
			return
		}
		// A request is hedged after twice the p99 of the last ones. When the machine was
		// busy that is long, until others have taken their place.
		wait(t, 3*time.Second)
	}
	t.Errorf("with %s frozen for %v a request took more than %v each of %d times, and what needs no HSM did not", member, length, longestWhileFrozen, attempts)
}

// freeze stops a process until thaw is called, or the test ends.
func freeze(t *testing.T, pid int) (thaw func()) {
	t.Helper()
	send(t, pid, syscall.SIGSTOP)
	thaw = func() { syscall.Kill(pid, syscall.SIGCONT) }
	t.Cleanup(thaw)
	return thaw
}
