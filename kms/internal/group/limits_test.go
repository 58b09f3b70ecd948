package group_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

func generate(typ pluginproto.KeyType) func(context.Context, group.Member) error {
	return func(ctx context.Context, m group.Member) error {
		_, err := m.Generate(ctx, pluginproto.KeySpec{ID: keyID(1), Type: typ})
		return err
	}
}

// within is a context that ends after a time, and so does the fake clock's patience.
func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestAMemberThatDoesNotComeToTheEndOfAKeyOperationIsDropped(t *testing.T) {
	hang := func(h *hsm) { h.keyDelay = time.Hour } // in C, while the token answers probes
	for _, c := range []struct {
		name  string
		call  func(context.Context, group.Member) error
		after time.Duration
	}{
		{"a pair of keys has two minutes", generate(pluginproto.RSA4096), 2 * time.Minute},
		{"a pair on a curve has them too", generate(pluginproto.ECP256), 2 * time.Minute},
		{"a secret key has the command timeout", generate(pluginproto.AES256), 20 * time.Second},
		{"so has a destruction", func(ctx context.Context, m group.Member) error { return m.Destroy(ctx, keyID(1)) }, 20 * time.Second},
		{"so has a copy that arrives", func(ctx context.Context, m group.Member) error {
			_, err := m.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneTarget, Protocol: "memory", Keys: []pluginproto.KeyID{keyID(1)}})
			return err
		}, 20 * time.Second},
		{"so has a copy that is given away", func(ctx context.Context, m group.Member) error {
			_, err := m.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: "memory", Keys: []pluginproto.KeyID{keyID(1)}})
			return err
		}, 20 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, waits := range []bool{true, false} {
				synctest.Test(t, func(t *testing.T) {
					r := newRig(t, three, nil).start()
					m, err := r.Member("b")
					if err != nil {
						t.Fatal(err)
					}
					r.hsms["b"].set(hang)
					ctx, want := t.Context(), c.after
					if !waits {
						ctx, want = within(t, time.Second), time.Second
					}
					began := time.Now()
					err = c.call(ctx, m)
					if took := time.Since(began); err == nil || took != want {
						t.Errorf("got %v after %v, want a failure after %v", err, took, want)
					}
					if waits && pluginproto.ClassOf(err) != pluginproto.ClassMember {
						t.Errorf("got %v, want the loss of the member", err)
					}
					elapse(time.Until(began.Add(c.after - time.Millisecond)))
					if !waits && r.told("b", api.MemberActive, api.MemberDown) != 0 {
						t.Error("the member was dropped before its time was over")
					}
					r.hsms["b"].set(func(h *hsm) { h.keyDelay = 0 })
					elapse(time.Second)
					if n := r.told("b", api.MemberActive, api.MemberDown); n != 1 {
						t.Errorf("the member was dropped %d times, want once", n)
					}
					r.wantState("b", api.MemberActive) // with a new driver
					if _, n, _ := r.hsms["b"].count(); n != 2 {
						t.Errorf("%d drivers were started, want 2", n)
					}
				})
			}
		})
	}
}

func TestAKeyOperationIsNotHeldUpByOneThatWasGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		r.hsms["a"].set(func(h *hsm) { h.keyDelay = time.Hour })
		if _, err := r.OnPrimary(within(t, time.Second), generate(pluginproto.RSA4096)); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
		began := time.Now()
		by, err := r.OnPrimary(within(t, 10*time.Second), generate(pluginproto.AES256))
		if by != "b" || err != nil || time.Since(began) > 0 {
			t.Errorf("made on %q with %v after %v, want b at once", by, err, time.Since(began))
		}
		if p := r.Status().Primary; p != "b" {
			t.Errorf("the primary is %q, want b as long as a is at it", p)
		}

		began = time.Now() // those that need a itself are told soon
		got := r.OnEach(within(t, 10*time.Second), nil, func(ctx context.Context, m group.Member) error { return m.Destroy(ctx, keyID(1)) })
		if !errors.Is(got["a"], group.ErrOccupied) || pluginproto.ClassOf(got["a"]) != pluginproto.ClassBusy || got["b"] != nil || got["c"] != nil {
			t.Errorf("got %v, want a to be occupied", got)
		}
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("that took %v, want at most 2s", took)
		}
		r.wantState("a", api.MemberActive)
		if by := r.mustDo() + r.mustDo() + r.mustDo(); len(by) != 3 {
			t.Errorf("commands were served by %s", by)
		}
		r.hsms["a"].set(func(h *hsm) { h.keyDelay = 0 })
		elapse(2 * time.Minute)
		if by, err := r.OnPrimary(t.Context(), generate(pluginproto.AES256)); by != "a" || err != nil {
			t.Errorf("made on %q with %v, want a, which was connected anew", by, err)
		}
	})
}

func TestWhenEveryMemberIsOccupiedThatIsTheAnswerAndNotTheLossOfTheGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil).start()
		for _, h := range r.hsms {
			h.set(func(h *hsm) { h.keyDelay = time.Hour })
		}
		for range 2 {
			if _, err := r.OnPrimary(within(t, time.Second), generate(pluginproto.RSA4096)); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("got %v", err)
			}
		}
		began := time.Now()
		_, err := r.OnPrimary(within(t, 30*time.Second), generate(pluginproto.AES256))
		if !errors.Is(err, group.ErrOccupied) || errors.Is(err, group.ErrLost) || time.Since(began) > 5*time.Second {
			t.Errorf("got %v after %v", err, time.Since(began))
		}
		want := "member b: the member is still at an earlier key operation: changing keys: the HSM has not come to its end"
		if err != nil && err.Error() != want {
			t.Errorf("got %q", err)
		}
		r.wantGroup(api.GroupNormal)
	})
}

func TestAKeyOperationWaitsForOneThatIsShort(t *testing.T) {
	for _, c := range []struct {
		name  string
		takes time.Duration
		waits bool
	}{
		{"it has its turn when the earlier one has ended", 1500 * time.Millisecond, true},
		{"it is told so when that takes long", 15 * time.Second, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []string{"a"}, nil).start()
				r.hsms["a"].set(func(h *hsm) { h.keyDelay = c.takes })
				m, err := r.Member("a")
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					if err := generate(pluginproto.AES256)(t.Context(), m); err != nil {
						t.Error(err)
					}
				}()
				synctest.Wait()
				err = m.Destroy(t.Context(), keyID(1))
				if c.waits && err != nil || !c.waits && !errors.Is(err, group.ErrOccupied) {
					t.Errorf("got %v", err)
				}
				elapse(c.takes)
			})
		})
	}
}

func TestAnAdmissionWhoseSourceHangsGivesTheLeaseBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r *rig
		hung := make(chan struct{})
		r = newRig(t, []string{"a", "b"}, func(c *group.Config) {
			c.Admit = admitWith(func(ctx context.Context, m group.Member, last bool) error {
				if m.Name() != "b" || !last || closed(hung) {
					return nil
				}
				close(hung)
				source, err := r.Member("a")
				if err != nil {
					return nil // a is not there yet
				}
				r.hsms["a"].set(func(h *hsm) { h.keyDelay = time.Hour })
				_, err = source.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: "memory", Keys: []pluginproto.KeyID{keyID(1)}})
				r.hsms["a"].set(func(h *hsm) { h.keyDelay = 0 })
				return err
			})
			connect := c.Members[1].Connect
			c.Members[1].Connect = func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
				elapse(100 * time.Millisecond) // after a
				return connect(ctx)
			}
		})
		r.start()
		<-hung
		release, err := r.Lease(within(t, 21*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		release()
		elapse(time.Minute)
		r.wantGroup(api.GroupNormal)
	})
}

// stuckConn is a driver one of whose methods hangs until it is killed.
type stuckConn struct {
	group.Conn
	stuck string
}

func (c *stuckConn) hang(method string) {
	if method == c.stuck {
		<-c.Done()
	}
}

func (c *stuckConn) Do(ctx context.Context, cmd pluginproto.Command) (pluginproto.Result, error) {
	if cmd.Op != pluginproto.OpProbe {
		c.hang("do")
	}
	return c.Conn.Do(ctx, cmd)
}

func (c *stuckConn) List(ctx context.Context) ([]pluginproto.Object, error) {
	c.hang("list")
	return c.Conn.List(ctx)
}

func (c *stuckConn) Inspect(ctx context.Context, id pluginproto.KeyID) (pluginproto.Object, error) {
	c.hang("inspect")
	return c.Conn.Inspect(ctx, id)
}

func (c *stuckConn) Generate(ctx context.Context, spec pluginproto.KeySpec) (pluginproto.Object, error) {
	c.hang("generate")
	return c.Conn.Generate(ctx, spec)
}

func (c *stuckConn) SetAttributes(ctx context.Context, id pluginproto.KeyID, attrs pluginproto.Attributes) error {
	c.hang("set attributes")
	return c.Conn.SetAttributes(ctx, id, attrs)
}

func (c *stuckConn) Destroy(ctx context.Context, id pluginproto.KeyID) error {
	c.hang("destroy")
	return c.Conn.Destroy(ctx, id)
}

func (c *stuckConn) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	c.hang("clone")
	return c.Conn.CloneStep(ctx, req)
}

func (c *stuckConn) Close() error {
	c.hang("close")
	return c.Conn.Close()
}

// TestNothingWaitsOnALockWhileAnHSMIsBeingCalled: whatever hangs in one member, the
// status and the commands of the others take no time at all.
func TestNothingWaitsOnALockWhileAnHSMIsBeingCalled(t *testing.T) {
	calls := map[string]func(ctx context.Context, r *rig, m group.Member) error{
		"do": func(ctx context.Context, r *rig, m group.Member) error {
			_, err := m.Do(ctx, encrypt)
			return err
		},
		"list": func(ctx context.Context, r *rig, m group.Member) error { _, err := m.List(ctx); return err },
		"inspect": func(ctx context.Context, r *rig, m group.Member) error {
			_, err := m.Inspect(ctx, keyID(1))
			return err
		},
		"generate": func(ctx context.Context, r *rig, m group.Member) error { return generate(pluginproto.AES256)(ctx, m) },
		"set attributes": func(ctx context.Context, r *rig, m group.Member) error {
			return m.SetAttributes(ctx, keyID(1), pluginproto.Attributes{})
		},
		"destroy": func(ctx context.Context, r *rig, m group.Member) error { return m.Destroy(ctx, keyID(1)) },
		"clone": func(ctx context.Context, r *rig, m group.Member) error {
			_, err := m.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: "memory", Keys: []pluginproto.KeyID{keyID(1)}})
			return err
		},
		"close": func(ctx context.Context, r *rig, m group.Member) error { r.Close(); return nil },
	}
	for method, call := range calls {
		t.Run(method, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, three, func(c *group.Config) {
					c.Hedge = true
					connect := c.Members[0].Connect
					c.Members[0].Connect = func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
						conn, info, err := connect(ctx)
						return &stuckConn{conn, method}, info, err
					}
				}).start()
				m, err := r.Member("a")
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan struct{})
				go func() {
					defer close(done)
					_ = call(within(t, time.Second), r, m)
				}()
				synctest.Wait()
				if closed(done) {
					t.Fatal("the call does not hang")
				}
				began := time.Now()
				for range 10 {
					r.Status()
					r.InStep()
					if _, err := r.do(); err != nil && method != "close" {
						t.Error(err)
					}
				}
				if took := time.Since(began); took > 10*time.Millisecond { // of the hedge, when it is a command that hangs
					t.Errorf("status and commands took %v", took)
				}
				<-done
			})
		})
	}
}

func TestTheHistogramCountsEveryCommandSinceTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a"}, nil).start()
		var sum time.Duration
		for _, d := range []time.Duration{0, 100 * time.Microsecond, time.Millisecond, 3 * time.Millisecond, 3 * time.Millisecond, 1500 * time.Millisecond} {
			r.hsms["a"].set(func(h *hsm) { h.delay = d })
			if _, err := r.Do(t.Context(), encrypt); err != nil {
				t.Error(err)
			}
			sum += d
			r.hsms["a"].set(func(h *hsm) { h.delay = 0 })
			elapse(10 * time.Second)
		}
		got := r.member("a").Latency
		var want api.Histogram
		want.Count, want.Sum = 6, sum
		for upTo, n := range map[time.Duration]uint64{100 * time.Microsecond: 2, time.Millisecond: 1, 5 * time.Millisecond: 2, 2500 * time.Millisecond: 1} {
			for j, bound := range api.LatencyBounds {
				if bound == upTo {
					want.Buckets[j] = n
				}
			}
		}
		if got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	})
}
