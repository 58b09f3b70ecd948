package e2e_test

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"kmsd/kms/api"
)

const (
	longestAnswer = 250 * time.Millisecond
	recoveredIn   = 5 * time.Second
)

func TestKillingAnyDriverIsNotNoticed(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	createKey(t, c, "shop")
	load := startLoad(t, c, "shop")
	settle(t, load)

	for i, m := range group(t, c).Members {
		if primary := group(t, c).Primary; i == 0 && m.Name != primary {
			t.Errorf("the primary is %s, want the first member, %s", primary, m.Name)
		}
		pid := awaitMember(t, c, m.Name, recoveredIn, isActive).DriverPID
		send(t, pid, syscall.SIGKILL)
		// A key that is made now has to be on the member before it serves again.
		createKey(t, c, fmt.Sprintf("made-while-away-%d", i))
		awaitMember(t, c, m.Name, recoveredIn, func(m api.Member) bool { return isActive(m) && m.DriverPID != pid })
		g, took := awaitWhole(t, c, recoveredIn)
		t.Logf("%s: active with all %d keys again, %v after its key was made", m.Name, g.Keys, took)
	}
	settle(t, nil)
	o := load.end()
	o.noneFailed(t, 1000)
	if longest := o.quantile(1); longest > longestAnswer {
		t.Errorf("an answer took %v, want at most %v", longest, longestAnswer)
	}
	allVerify(t, c)
}

func TestKillingADriverOverAndOver(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	createKey(t, c, "shop")
	load := startLoad(t, c, "shop")
	for i := range 9 {
		m := group(t, c).Members[i%3]
		send(t, awaitMember(t, c, m.Name, recoveredIn, isActive).DriverPID, syscall.SIGKILL)
		awaitWhole(t, c, recoveredIn)
	}
	o := load.end()
	o.noneFailed(t, 500)
	if longest := o.quantile(1); longest > longestAnswer {
		t.Errorf("an answer took %v, want at most %v", longest, longestAnswer)
	}
}

func TestAFrozenDriverIsNotNoticedAndComesBack(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	createKey(t, c, "shop")
	load := startLoad(t, c, "shop")
	settle(t, load)

	for i, m := range group(t, c).Members {
		pid := awaitMember(t, c, m.Name, recoveredIn, isActive).DriverPID
		send(t, pid, syscall.SIGSTOP)
		t.Cleanup(func() { syscall.Kill(pid, syscall.SIGCONT) })
		frozen := awaitMember(t, c, m.Name, 10*time.Second, func(m api.Member) bool { return !isActive(m) })
		t.Logf("%s: %s (%s)", frozen.Name, frozen.State, frozen.Reason)
		createKey(t, c, fmt.Sprintf("made-while-frozen-%d", i))
		send(t, pid, syscall.SIGCONT)
		_, took := awaitWhole(t, c, recoveredIn)
		t.Logf("%s: active with every key again %v after SIGCONT", m.Name, took)
	}
	load.end().noneFailed(t, 1000)
	allVerify(t, c)
}

func TestKeysAreMadeWhileADriverIsFrozen(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	g := group(t, c)
	for i, m := range []api.Member{g.Members[0], g.Members[2]} { // the primary, and another one
		pid := awaitMember(t, c, m.Name, recoveredIn, isActive).DriverPID
		send(t, pid, syscall.SIGSTOP)
		begin := time.Now()
		createKey(t, c, fmt.Sprintf("frozen-%d", i)) // at once, before anyone knows
		t.Logf("made with %s frozen in %v", m.Name, time.Since(begin))
		send(t, pid, syscall.SIGCONT)
		awaitWhole(t, c, recoveredIn)
	}
	allVerify(t, c)
}

func isActive(m api.Member) bool { return m.State == api.MemberActive && m.Missing == 0 }

func isFailed(m api.Member) bool { return m.State == api.MemberFailed }

// settle lets the load run for a second; what came before is forgotten, as the
// connections are only being made.
func settle(t *testing.T, load *openLoad) {
	t.Helper()
	select {
	case <-time.After(time.Second):
	case <-t.Context().Done():
	}
	if load != nil {
		if o := load.take(); len(o.failures) > 0 {
			t.Fatalf("requests fail before anything was done: %v", o.failures[0])
		}
	}
}

// allVerify asks every member for its copy of every version of every key.
func allVerify(t *testing.T, svc api.Service) {
	t.Helper()
	page, err := svc.Keys(t.Context(), api.ListOptions{Limit: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range page.Keys {
		v, err := svc.Verify(t.Context(), k.Name)
		if err != nil {
			t.Fatal(err)
		}
		if !v.OK || len(v.Copies) != 3*len(k.Versions) {
			t.Errorf("key %s is not whole: %+v", k.Name, v.Copies)
		}
	}
}
