package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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
	load := startMeasured(t, c, "shop")
	m := group(t, c).Members[0] // the primary
	wait(t, time.Second)        // so that it is known how long wraps take
	load.begin(t)
	send(t, m.DriverPID, syscall.SIGSTOP)
	stopped := time.Now()
	wait(t, 3*time.Second) // until it is out of choice
	first := load.sinceBegin(t)
	load.wraps.end().noFailure(t)
	load.control.end()
	t.Logf("%v", first)
	first.noneWaited(t, longestAnswer) // the silence is noticed after the probe interval
	first.wraps.noneFailed(t, 200)
	later := startLoad(t, c, "shop", 100)
	awaitMember(t, c, m.Name, commandTimeout+recoveredIn, func(now api.Member) bool { return isActive(now) && now.DriverPID != m.DriverPID })
	t.Logf("%s has a new driver %v after SIGSTOP", m.Name, time.Since(stopped))
	awaitGone(t, recoveredIn, m.DriverPID)
	later.end().noneFailed(t, 400)
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
	load.end().noneFailed(t, 100)
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
		killed := time.Now()
		_, err := c.Unwrap(t.Context(), "shop", wrapped, nil)
		took := time.Since(killed)
		awaitAllReplaced(t, c, g, 3)
		if err == nil {
			continue
		}
		// Nobody waits for a member that takes longer than it is given.
		back := firstBack(t, c, killed).Sub(killed)
		t.Logf("%v, after %v; the first member was back after %v", err, took, back)
		if !errors.Is(err, api.ErrGroupLost) || back < lostGrace-lostGrace/8 {
			t.Errorf("unwrapping while all drivers are gone: %v, after %v; the first member was back after %v", err, took, back)
		}
	}
	allVerify(t, c)
}

// firstBack returns when the group, which was lost since a moment, was served again.
func firstBack(t *testing.T, c *client.Client, since time.Time) time.Time {
	t.Helper()
	lost := awaitTurn(t, c, since, api.GroupLost)
	return awaitEvent(t, c, "a member to serve", func(e api.Event) bool {
		return e.Type == api.EventMember && e.To == string(api.MemberActive) && !e.Time.Before(lost)
	})
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
