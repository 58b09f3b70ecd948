package e2e_test

import (
	"context"
	"fmt"
	"syscall"
	"testing"
	"time"

	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

// longestAnswer is within what every request is answered although drivers die, on a
// machine that has time for it.
const longestAnswer = 250 * time.Millisecond

func TestKillingAnyDriverIsNotNoticed(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	cfg := configOf(t, s)
	createKey(t, c, "shop")
	load := startLoad(t, c, "shop", 300)
	control := startControl(t, c, "shop")
	settle(t, load)

	if g := group(t, c); g.Primary != g.Members[0].Name {
		t.Errorf("the primary is %s, want the first member, %s", g.Primary, g.Members[0].Name)
	}
	late := 0 // how many members were
	for i, m := range group(t, c).Members {
		send(t, m.DriverPID, syscall.SIGKILL)
		killed := time.Now()
		// A key that is made now has to be on the member before it serves again.
		createKey(t, c, fmt.Sprintf("made-while-away-%d", i))
		opened := startOpening(t, cfg, m.Name)
		awaitReplaced(t, c, m)
		g, _ := awaitWhole(t, c, recoveredIn)
		took, opening := time.Since(killed), opened().quantile(0.5)
		t.Logf("%s: active with all %d keys again after %v; a driver opens its token within %v", m.Name, g.Keys, took, opening)
		// A dead process is not missed for as long as a silent one, and the first attempt
		// comes at once. The machine may stop for as long, but not each time.
		if took > probeInterval+2*share*opening {
			if late++; late > 1 {
				t.Errorf("%s too took %v to be active with every key, want at most %v; a driver opens its token within %v", m.Name, took, probeInterval, opening)
			}
		}
		wait(t, time.Second)
	}
	o := stall{wraps: load.end(), control: control.end()}
	o.wraps.noneFailed(t, 300)
	o.noneWaited(t, longestAnswer)
	allVerify(t, c)
}

func TestKillingADriverOverAndOver(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	createKey(t, c, "shop")
	load := startLoad(t, c, "shop", 300)
	control := startControl(t, c, "shop")
	settle(t, load)
	for i := range 9 {
		m := group(t, c).Members[i%3]
		send(t, m.DriverPID, syscall.SIGKILL)
		awaitReplaced(t, c, m)
		awaitWhole(t, c, recoveredIn)
	}
	o := stall{wraps: load.end(), control: control.end()}
	o.wraps.noneFailed(t, 100)
	o.noneWaited(t, longestAnswer)
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

// awaitReplaced waits until a member whose driver was killed serves with a new one.
func awaitReplaced(t *testing.T, c *client.Client, killed api.Member) {
	t.Helper()
	awaitMember(t, c, killed.Name, recoveredIn, func(m api.Member) bool { return isActive(m) && m.DriverPID != killed.DriverPID })
}

// settle lets the load run for a second; what came before is forgotten, as the
// connections are only being made.
func settle(t *testing.T, load *openLoad) {
	t.Helper()
	wait(t, time.Second)
	if o := load.take(); len(o.failures) > 0 {
		t.Fatalf("requests fail before anything was done: %v", o.failures[0])
	}
}

// wait lets the load run.
func wait(t *testing.T, d time.Duration) {
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
}

// allVerify asks every member for its copy of every living version of every key.
func allVerify(t *testing.T, svc api.Service) {
	t.Helper()
	page, err := svc.Keys(t.Context(), api.ListOptions{Limit: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range page.Keys {
		v := verify(t, svc, k.Name)
		living := 0
		for _, version := range k.Versions {
			if version.State != api.StateDestroyed {
				living++
			}
		}
		if !v.OK || len(v.Copies) != 3*living {
			t.Errorf("key %s is not whole: %+v", k.Name, v.Copies)
		}
	}
}

// verify asks every member for its copies of a key until all of them have answered: one that
// had no time to is soon asked again, and has not lost anything.
func verify(t *testing.T, svc api.Service, key string) (v api.Verification) {
	t.Helper()
	await(t, recoveredIn, func(ctx context.Context) error {
		return devserver.Poll(ctx, func() (err error) {
			if v, err = svc.Verify(ctx, key); err != nil {
				return err
			}
			for _, copy := range v.Copies {
				if copy.State == "unknown" {
					return fmt.Errorf("%s does not say whether it holds version %d of %s", copy.Member, copy.Version, key)
				}
			}
			return nil
		})
	})
	return v
}
