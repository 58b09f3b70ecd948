package chaos_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"syscall"
	"testing"
	"time"

	"kmsd/e2e/chaos"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
)

// A key that is destroyed while a member is away does not come back, and one that is made
// is on it when it serves, although kmsd was killed in between.
func TestWhatAMemberMissedOutlivesKmsd(t *testing.T) {
	build(t)
	s := newSite(t, chaos.SoftHSM, 3, fixedSeed)
	ctx, cancel := context.WithTimeout(t.Context(), 2*stepTime)
	defer cancel()
	away := s.hsms[1]
	before := s.create(t, "before")

	must(t, away.order("crash"))
	if _, err := s.send(ctx, away, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := s.await(ctx, away, "away", func(m api.Member) bool { return m.State == api.MemberDown }); err != nil {
		t.Fatal(err)
	}
	during := s.create(t, "during")
	if _, err := s.operator.Destroy(ctx, "before", 0); err != nil {
		t.Fatal(err)
	}
	must(t, s.restart(ctx))
	must(t, away.order(""))
	if _, err := s.whole(ctx, away, 0); err != nil {
		t.Fatal(err)
	}
	if v, err := s.operator.Verify(ctx, "during"); err != nil || !v.OK {
		t.Errorf("verifying the key that was made meanwhile: %+v, %v", v, err)
	}
	must(t, s.server.Stop(ctx))
	final := chaos.Final{Tokens: map[string]map[string]string{}}
	s.readDisks(ctx, t, &final)
	values := slices.Collect(maps.Values(final.Tokens[away.name]))
	if !slices.Contains(values, during) {
		t.Errorf("%s does not hold the key that was made while it was away", away.name)
	}
	if slices.Contains(values, before) {
		t.Errorf("%s holds the key that was destroyed while it was away", away.name)
	}
}

// When all members are lost everything fails fast, the status answers, and the first
// member that returns serves by itself.
func TestAllMembersAreLostAndReturn(t *testing.T) {
	build(t)
	s := newSite(t, chaos.SoftHSM, 3, fixedSeed)
	ctx, cancel := context.WithTimeout(t.Context(), 2*stepTime)
	defer cancel()
	s.create(t, "shop")
	plain := []byte("a data key made before")
	wrapped, err := s.operator.Wrap(ctx, "shop", plain, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range s.hsms {
		must(t, h.order("crash"))
		if _, err := s.send(ctx, h, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	if err := devserver.Poll(ctx, func() error {
		g, err := s.operator.Group(ctx, group)
		if err == nil && g.State != api.GroupLost {
			err = fmt.Errorf("the group is %s", g.State)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	// For 2 s a command waits for a member that may be coming back at once. After that
	// it fails immediately, with the name of what has happened.
	pause(ctx, 2*time.Second)
	quickest := quickestOf(5, func() {
		if _, err := s.operator.Unwrap(ctx, "shop", wrapped, nil); api.AsError(err).Code != api.CodeGroupLost {
			t.Errorf("unwrapping without any member: %v, want group_lost", err)
		}
	})
	if quickest > time.Second { // half of what each wait would take
		t.Errorf("refusing took %v and more", quickest)
	}

	// One is mended; nobody tells kmsd.
	first := s.hsms[2]
	must(t, first.order(""))
	returned := make(chan time.Time, 1)
	go func() {
		_, err := s.await(ctx, first, "back", func(m api.Member) bool { return m.State == api.MemberActive })
		if err != nil {
			t.Error(err)
		}
		returned <- time.Now()
	}()
	if err := devserver.Poll(ctx, func() error {
		got, err := s.operator.Unwrap(ctx, "shop", wrapped, nil)
		if err == nil && !bytes.Equal(got, plain) {
			err = devserver.Final(fmt.Errorf("got %q", got))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	success := time.Now()
	back := <-returned
	t.Logf("the first success came %v after the first member's return", success.Sub(back))
	if late := success.Sub(back); late > commandTimeout {
		t.Errorf("the first success came %v after the first member's return, want less than the HSM timeout of %v", late, commandTimeout)
	}
	for _, h := range s.hsms {
		must(t, h.order(""))
	}
	if _, err := devserver.AwaitWhole(ctx, s.operator); err != nil {
		t.Fatal(err)
	}
}

// When kmsd itself stands still for longer than any request and any command may take, no
// member is dropped for it: it is kmsd that owes the answers. Programs whose time is over
// meanwhile are told so by their clients, in time.
func TestAKmsdThatStoodStillDropsNoMember(t *testing.T) {
	build(t)
	s := newSite(t, chaos.SoftHSM, 3, fixedSeed)
	ctx, cancel := context.WithTimeout(t.Context(), 2*stepTime)
	defer cancel()
	history := new(chaos.History)
	l := startLoad(t, s, history)
	before, err := s.operator.Group(ctx, group)
	if err != nil {
		t.Fatal(err)
	}
	l.wg.Go(func() { l.burst(ctx, time.Second) }) // with a key operation under way
	pause(ctx, 300*time.Millisecond)
	stopped := time.Now()
	must(t, s.freeze(ctx, max(deadline, 4*commandTimeout)+2*time.Second))
	resumed := time.Now()
	// As many requests again, all of which have to be answered.
	pause(ctx, time.Second)
	after, err := devserver.AwaitWhole(ctx, s.operator)
	if err != nil {
		t.Fatal(err)
	}
	l.end()
	for i, was := range before.Members {
		if is := after.Members[i]; is.DriverPID != was.DriverPID || !is.Since.Equal(was.Since) {
			t.Errorf("%s was lost: driver %d, %s since %v; before, driver %d since %v", is.Name, is.DriverPID, is.State, is.Since, was.DriverPID, was.Since)
		}
	}
	expired := 0
	requests := history.Requests()
	for i := range requests {
		r := &requests[i]
		// Whoever was about to try again hears why the last attempt was in vain.
		inVain := r.Code == api.CodeUnavailable && r.End.Sub(r.Start) >= deadline
		if (r.Code == api.CodeDeadline || inVain) && r.Start.Before(resumed) && r.End.After(stopped) {
			expired++
			r.Hurried = true // it had to fail, but not late
		}
	}
	if expired == 0 {
		t.Error("no request was under way for its whole time")
	}
	for _, v := range chaos.Check(requests, chaos.Final{Stalls: l.stalls, States: states(ctx, t, s)}) {
		if v.Rule != chaos.Lost { // nobody opens the envelopes here
			t.Error(v)
		}
	}
}

// create makes a key and returns its check value.
func (s *site) create(t *testing.T, name string) string {
	t.Helper()
	k, err := s.operator.CreateMasterKey(t.Context(), name, api.KeyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return k.Versions[0].CheckValue
}

// states is what kmsd says of each key.
func states(ctx context.Context, t *testing.T, s *site) map[string]api.State {
	t.Helper()
	page, err := s.operator.Keys(ctx, api.ListOptions{Limit: 1000})
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]api.State{}
	for _, k := range page.Keys {
		all[k.Name] = k.State
	}
	return all
}

// quickestOf is how long something takes when the machine has nothing else to do: the least
// of several times.
func quickestOf(times int, act func()) time.Duration {
	least := time.Duration(math.MaxInt64)
	for range times {
		begin := time.Now()
		act()
		least = min(least, time.Since(begin))
	}
	return least
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
