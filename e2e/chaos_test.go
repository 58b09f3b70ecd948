package e2e_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

func TestADriverThatNeverWakesUpIsReplaced(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	createKey(t, c, "shop")
	load := startLoad(t, c, "shop", 100)
	m := group(t, c).Members[1]
	send(t, m.DriverPID, syscall.SIGSTOP)
	stopped := time.Now()
	const commandTimeout = 20 * time.Second // the default
	awaitMember(t, c, m.Name, commandTimeout+recoveredIn, func(now api.Member) bool { return isActive(now) && now.DriverPID != m.DriverPID })
	t.Logf("%s has a new driver %v after SIGSTOP", m.Name, time.Since(stopped))
	if running(m.DriverPID) {
		t.Errorf("the frozen driver, %d, still runs", m.DriverPID)
	}
	load.end().noneFailed(t, 2000)
	allVerify(t, c)
}

func TestTwoOfThreeDriversDieAtOnce(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	createKey(t, c, "shop")
	load := startLoad(t, c, "shop", 100)
	settle(t, load)
	for range 5 {
		g := group(t, c)
		for _, i := range rand.Perm(3)[:2] {
			send(t, g.Members[i].DriverPID, syscall.SIGKILL)
		}
		awaitAllReplaced(t, c, g, 2)
	}
	load.end().noneFailed(t, 400)
	allVerify(t, c)
}

func TestAllDriversDieAtOnce(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	createKey(t, c, "shop")
	wrapped := wrap(t, c, "shop", random(32), nil)
	for range 3 {
		g := group(t, c)
		for _, m := range g.Members {
			send(t, m.DriverPID, syscall.SIGKILL)
		}
		// The first that comes back answers what was asked meanwhile.
		begin := time.Now()
		if _, err := c.Unwrap(t.Context(), "shop", wrapped, nil); err != nil {
			t.Errorf("unwrapping while all drivers are gone: %v, after %v", err, time.Since(begin))
		}
		awaitAllReplaced(t, c, g, 3)
	}
	allVerify(t, c)
}

// awaitAllReplaced waits until the group is whole again with n new drivers.
func awaitAllReplaced(t *testing.T, c *client.Client, before api.Group, n int) {
	t.Helper()
	await(t, recoveredIn, func(ctx context.Context) error {
		return devserver.Poll(ctx, func() error {
			g, err := c.Group(ctx, before.Name)
			if err != nil {
				return err
			}
			replaced := 0
			for i, m := range g.Members {
				if m.DriverPID != before.Members[i].DriverPID {
					replaced++
				}
			}
			if replaced != n {
				return fmt.Errorf("%d drivers are new, want %d", replaced, n)
			}
			return devserver.AllActive(g)
		})
	})
}

// chaosTime is how long the faults go on.
const chaosTime = 10 * time.Second

// TestChaos kills and freezes drivers at random, two of three at most at any time,
// while keys are made, rotated and destroyed. No wrap or unwrap may fail, and in the
// end tokens and catalog have to agree.
func TestChaos(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	createKey(t, c, "shop")
	load := startLoad(t, c, "shop", 100)
	settle(t, load)

	acks := &acknowledged{}
	ctx, cancel := context.WithTimeout(t.Context(), chaosTime)
	defer cancel()
	var faults sync.WaitGroup
	hurting := make(chan struct{}, 2) // a place for each member that may be hurt at a time
	for _, m := range group(t, c).Members {
		faults.Go(func() {
			for ctx.Err() == nil {
				wait(t, time.Duration(200+rand.IntN(600))*time.Millisecond)
				hurting <- struct{}{}
				hurt(t, c, m.Name)
				<-hurting
			}
		})
	}
	made := manageKeys(t, ctx, c, acks)
	faults.Wait()
	made.Wait()
	cancel()

	g, took := awaitWhole(t, c, 10*time.Second)
	load.end().noneFailed(t, 2000)
	t.Logf("%d versions acknowledged, %d keys destroyed, %d living; whole %v after the last fault", len(acks.keys), len(acks.destroyed), g.Keys, took)
	allVerify(t, c)
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	cfg := configOf(t, s)
	living, gone := readCatalog(t, cfg.Catalog.Bolt.Path)
	for _, m := range cfg.Groups[0].Members {
		checkToken(t, cfg, m.Name, acks, living, gone)
	}
}

// hurt kills the driver of a member that serves, or freezes it for a while, and
// waits until the member serves again.
func hurt(t *testing.T, c *client.Client, name string) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*recoveredIn)
	defer cancel()
	pid, err := serving(ctx, c, name)
	if err != nil {
		t.Error(err)
		return
	}
	if rand.IntN(2) == 0 {
		syscall.Kill(pid, syscall.SIGKILL)
	} else {
		syscall.Kill(pid, syscall.SIGSTOP)
		wait(t, time.Duration(rand.IntN(3000))*time.Millisecond)
		syscall.Kill(pid, syscall.SIGCONT)
	}
	wait(t, 20*time.Millisecond) // until it has been noticed
	if _, err := serving(ctx, c, name); err != nil {
		t.Error(err)
	}
}

// serving waits until a member serves and returns its driver's process ID, which is
// never 0: that would send signals to the test itself.
func serving(ctx context.Context, c *client.Client, name string) (pid int, err error) {
	err = devserver.Poll(ctx, func() error {
		m, err := member(ctx, c, name)
		if err == nil && (!isActive(m) || m.DriverPID <= 0) {
			err = fmt.Errorf("member %s is %s: %s", name, m.State, m.Reason)
		}
		pid = m.DriverPID
		return err
	})
	return pid, err
}

func member(ctx context.Context, c *client.Client, name string) (api.Member, error) {
	g, err := c.Group(ctx, devserver.DefaultGroup)
	if err != nil {
		return api.Member{}, err
	}
	return devserver.Member(g, name)
}

// manageKeys makes and destroys keys until ctx ends. It may be told to try again,
// and that is all.
func manageKeys(t *testing.T, ctx context.Context, c *client.Client, acks *acknowledged) *sync.WaitGroup {
	var wg sync.WaitGroup
	for worker := range 2 {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				work := acks.makeOne
				if rand.IntN(4) == 0 {
					work = acks.destroyOne
				}
				name := fmt.Sprintf("key-%d-%d", worker, n)
				if err := work(context.WithoutCancel(ctx), c, name); err != nil && !api.AsError(err).Retryable {
					t.Errorf("managing %s: %v", name, err)
				}
			}
		})
	}
	return &wg
}
