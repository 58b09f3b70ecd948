package e2e_test

import (
	"context"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"kmsd/e2e/look"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

// A member misses the end of one key and the making of another, because its token is not
// there, and kmsd is killed before it returns.
func TestAMemberReturnsWithWhatItMissedAlthoughKmsdWasKilled(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	cfg := configOf(t, s)
	away := group(t, c).Members[2]
	old := createKey(t, c, "old")
	wrappedByOld := wrap(t, c, "old", random(32), nil)

	bring := takeToken(t, s, away)
	awaitMember(t, c, away.Name, recoveredIn, func(m api.Member) bool { return m.DriverPID != away.DriverPID && !isActive(m) })
	made := createKey(t, c, "made")
	if _, err := c.Destroy(t.Context(), "old", 0); err != nil {
		t.Fatal(err)
	}
	s.Kill()
	s = serve(t, s)
	c = dial(t, s)
	await(t, recoveredIn, func(ctx context.Context) error {
		return devserver.Poll(ctx, func() error { _, err := c.Wrap(ctx, "made", []byte("x"), nil); return err })
	})

	// The key is wanted all the time, so the member is asked for it as soon as it serves.
	load := startLoad(t, c, "made", 200)
	served := watchFor(t, c, away.Name, api.MemberActive)
	bring()
	since := served(t)
	now := awaitMember(t, c, away.Name, recoveredIn, isActive)
	t.Logf("%s serves %v after kmsd has said so, with %d keys and %d commands", now.Name, time.Since(since), now.Keys, now.Commands)
	onToken := checkValues(t, cfg, away.Name)
	if !onToken[made.Versions[0].CheckValue] {
		t.Errorf("%s serves without the key that was made while it was away", away.Name)
	}
	if onToken[old.Versions[0].CheckValue] {
		t.Errorf("%s serves with the key that was destroyed while it was away", away.Name)
	}
	awaitMember(t, c, away.Name, recoveredIn, func(m api.Member) bool { return m.Commands > now.Commands+10 })
	load.end().noneFailed(t, 10)
	if got, err := c.Unwrap(t.Context(), "old", wrappedByOld, nil); err == nil {
		t.Errorf("the destroyed key unwraps: %d bytes", len(got))
	}
	allVerify(t, c)
}

// statusIn is within what the status of a group is shown, whatever its members do, on a
// machine that has time for it.
const statusIn = 10 * time.Millisecond

// All members are lost: they hang, their drivers die, their tokens are not there. All
// the while programs go on asking, and the status is shown from memory.
func TestALostGroupShowsItsStatusAndServesWithItsFirstMember(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	createKey(t, c, "shop")
	load := startPrograms(t, &openLoad{c: c, key: "shop", send: (*openLoad).wrap, interval: 100 * time.Millisecond}, 32)
	control := &openLoad{c: c, key: "shop"} // is sent with each look at the group
	status := startOpenLoad(t, &openLoad{c: c, interval: 10 * time.Millisecond, send: func(l *openLoad, due time.Time) {
		var both sync.WaitGroup
		both.Go(func() { control.read(due) })
		l.status(due)
		both.Wait()
	}})
	settle(t, load)
	during := func(what string, happen func()) {
		t.Helper()
		status.take()
		control.take()
		happen()
		awaitState(t, c, api.GroupNormal)
		shown, read, wraps := status.take(), control.take(), load.take()
		t.Logf("%s: the status: %v; a key: %v; wraps: %v", what, shown, read, wraps)
		shown.noFailure(t)
		// What needs no HSM either tells how much of the time is the machine's. Both are
		// asked for all the time, so that a wait for the start of a driver is seen by all who
		// ask meanwhile; a wait for an HSM is as long as the probe interval.
		for part, limit := range map[float64]time.Duration{0.5: statusIn, 0.9: statusIn, 1: probeInterval / 2} {
			if took, other := shown.quantile(part), read.quantile(part); took > limit+share*other {
				t.Errorf("%s: the part %v of the status was shown within %v, of a key within %v; want %v", what, part, took, other, limit)
			}
		}
		for _, err := range wraps.failures {
			if code := api.AsError(err).Code; code != api.CodeGroupLost {
				t.Fatalf("%s: %s: %v", what, code, err)
			}
		}
	}

	during("all hang", func() {
		since := time.Now()
		for _, m := range group(t, c).Members {
			defer freeze(t, m.DriverPID)()
		}
		awaitTurn(t, c, since, api.GroupLost)
		wait(t, time.Second)
	})
	during("all drivers die", func() {
		g := group(t, c)
		for _, m := range g.Members {
			send(t, m.DriverPID, syscall.SIGKILL)
		}
		awaitAllReplaced(t, c, g, 3)
	})
	during("no token is there", func() {
		bring := takeAll(t, s, c)
		servesAgain(t, s, c, "hsm-b", bring)
		bringBack(t, c, bring)
	})

	// The same when nobody asks for anything meanwhile.
	load.end()
	bring := takeAll(t, s, c)
	servesAgain(t, s, c, "hsm-c", bring)
	bringBack(t, c, bring)
	awaitWhole(t, c, recoveredIn)
	allVerify(t, c)
}

// inVain is after how many attempts recovery, which doubles its pauses from 250 ms, would
// pause for 16 s if somebody served.
const inVain = 7

// servesAgain brings the token of one member back, after so many attempts that the next
// would be far away, and checks that the member serves as soon as its driver has opened the
// token, and a program as soon as the member does. Without a load there is no call at all
// until then.
func servesAgain(t *testing.T, s *devserver.Server, c *client.Client, member string, bring map[string]func()) {
	t.Helper()
	awaitMember(t, c, member, recoveredIn, func(m api.Member) bool {
		if m.NextRecovery == nil || m.RecoveryAttempts < inVain {
			return false // an attempt is under way, or there were too few
		}
		if pause := time.Until(*m.NextRecovery); pause > lostPause+time.Millisecond { // to which it is rounded
			t.Errorf("nobody serves, and the next attempt for %s is %v away, want at most %v", member, pause, lostPause)
		}
		return true
	})
	served := watchFor(t, c, member, api.MemberActive)
	bring[member]()
	delete(bring, member)
	brought := time.Now()
	opened := startOpening(t, configOf(t, s), member)
	active := served(t)
	opening := opened().quantile(0.5)
	t.Logf("%s serves %v after its token was there; a driver opens it within %v", member, active.Sub(brought), opening)
	// An attempt that began too early fails first; and what the member holds is looked at. A
	// pause of recovery would be many times as long as the machine may be at something else.
	if limit := lostPause + 2*share*opening + commandTimeout/4; active.Sub(brought) > limit {
		t.Errorf("%s served %v after its token was there, want at most %v; a driver opens it within %v", member, active.Sub(brought), limit, opening)
	}
	began := time.Now()
	if _, err := c.Wrap(t.Context(), "shop", random(32), nil); err != nil {
		t.Errorf("%s serves and a wrap fails: %v", member, err)
	}
	wrapped := time.Now()
	if _, err := c.Key(t.Context(), "shop"); err != nil {
		t.Error(err)
	}
	took, read := wrapped.Sub(began), time.Since(wrapped)
	t.Logf("the first success took %v, what needs no HSM %v", took, read)
	if took > probeInterval/2+share*read { // no probe has to come first
		t.Errorf("%s serves and a wrap took %v, what needs no HSM %v", member, took, read)
	}
}

// wrap wraps.
func (l *openLoad) wrap(due time.Time) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err := l.c.Wrap(ctx, l.key, make([]byte, 32), nil)
	l.record(due, "wrap", err)
}

// status looks at the group.
func (l *openLoad) status(due time.Time) {
	_, err := l.c.Group(context.Background(), devserver.DefaultGroup)
	l.record(due, "status", err)
}

// takeToken takes the folder of a member's token away and ends its driver; bring puts the
// folder back.
func takeToken(t *testing.T, s *devserver.Server, m api.Member) (bring func()) {
	t.Helper()
	path := filepath.Join(s.Dir, "tokens", m.Name)
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	send(t, m.DriverPID, syscall.SIGKILL)
	return func() {
		if err := os.Rename(path+".away", path); err != nil {
			t.Error(err)
		}
	}
}

// takeAll takes every token away and waits until kmsd knows; the result puts each back.
func takeAll(t *testing.T, s *devserver.Server, c *client.Client) map[string]func() {
	t.Helper()
	awaitWhole(t, c, recoveredIn)
	bring := map[string]func(){}
	for _, m := range group(t, c).Members {
		bring[m.Name] = takeToken(t, s, m)
	}
	awaitState(t, c, api.GroupLost)
	return bring
}

// bringBack puts every token back and has an operator bring its member back: once another
// one serves, recovery pauses for up to a minute after so many attempts, if the last was
// under way already when the token was put back.
func bringBack(t *testing.T, c *client.Client, bring map[string]func()) {
	t.Helper()
	for member, back := range bring {
		back()
		await(t, recoveredIn, func(ctx context.Context) error {
			return devserver.Poll(ctx, func() error { return c.Recover(ctx, devserver.DefaultGroup, member) })
		})
	}
}

func awaitState(t *testing.T, c *client.Client, want api.GroupState) {
	t.Helper()
	await(t, recoveredIn, func(ctx context.Context) error {
		return devserver.Poll(ctx, func() error {
			g, err := c.Group(ctx, devserver.DefaultGroup)
			if err == nil && g.State != want {
				err = fmt.Errorf("the group is %s: %+v", g.State, g.Members)
			}
			return err
		})
	})
}

// awaitTurn waits until the group has come into a state since a moment, and returns when that
// was. Whoever looks at the group now and then may miss a state that does not last.
func awaitTurn(t *testing.T, c *client.Client, since time.Time, state api.GroupState) time.Time {
	t.Helper()
	return awaitEvent(t, c, "the group to be "+string(state), func(e api.Event) bool {
		return e.Type == api.EventGroup && e.To == string(state) && e.Time.After(since)
	})
}

// watchFor begins to watch the events for a member's next entry into a state; reached
// waits for that and returns when it was.
func watchFor(t *testing.T, c *client.Client, member string, state api.MemberState) (reached func(t *testing.T) time.Time) {
	since := time.Now()
	return func(t *testing.T) time.Time {
		t.Helper()
		return awaitEvent(t, c, fmt.Sprintf("%s to be %s", member, state), func(e api.Event) bool {
			return e.Type == api.EventMember && e.Member == member && e.To == string(state) && e.Time.After(since)
		})
	}
}

// awaitEvent waits for the first event that is meant, of those to come and those that are
// remembered, and returns when it was.
func awaitEvent(t *testing.T, c *client.Client, what string, meant func(api.Event) bool) (at time.Time) {
	t.Helper()
	await(t, recoveredIn, func(ctx context.Context) error {
		for e := range c.EventsAfter(ctx, 1000) { // so that none is missed while the stream opens
			if meant(e) {
				at = e.Time
				return nil
			}
		}
		return fmt.Errorf("waiting for %s: %w", what, ctx.Err())
	})
	return at
}

// checkValues reads those of all keys that are on a token, past kmsd.
func checkValues(t *testing.T, cfg look.Config, member string) map[string]bool {
	t.Helper()
	objects, err := openToken(t, cfg, member).List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]bool{}
	for _, o := range objects {
		values[hex.EncodeToString(o.CheckValue)] = true
	}
	return values
}
