package group_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

func TestTheLeaseExcludes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a"}, nil).start()
		release, err := r.Lease(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.Lease(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a second lease: %v", err)
		}
		release()
		release() // once more does no harm
		first, err := r.Lease(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer first()
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.Lease(ctx); err == nil {
			t.Error("releasing twice let two in")
		}
	})
}

func TestOnPrimaryGoesToTheNextMemberAndBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		generate := func(ctx context.Context, m group.Member) error {
			_, err := m.Generate(ctx, pluginproto.KeySpec{ID: keyID(1)})
			return err
		}
		if by, err := r.OnPrimary(t.Context(), generate); by != "a" || err != nil {
			t.Errorf("made on %q with %v, want the first member", by, err)
		}
		r.hsms["a"].set(func(h *hsm) {
			h.refusal = errors.New("no power")
			h.fault = func(pluginproto.Command) error { return errDevice() }
		})
		if by, err := r.OnPrimary(t.Context(), generate); by != "b" || err != nil {
			t.Errorf("made on %q with %v, want the next member", by, err)
		}
		r.wantState("a", api.MemberDown)
		if p := r.Status().Primary; p != "b" {
			t.Errorf("the primary is %q", p)
		}
		r.hsms["a"].set(func(h *hsm) { h.refusal, h.fault = nil, nil })
		elapse(5 * time.Second)
		if by, err := r.OnPrimary(t.Context(), generate); by != "a" || err != nil {
			t.Errorf("made on %q with %v, want the first member again", by, err)
		}
		exists := pluginproto.Errorf(pluginproto.ClassCaller, "generating", "the key exists")
		r.hsms["a"].set(func(h *hsm) { h.fault = func(pluginproto.Command) error { return exists } })
		if by, err := r.OnPrimary(t.Context(), generate); by != "" || !errors.Is(err, exists) {
			t.Errorf("made on %q with %v, want the caller's mistake back", by, err)
		}
	})
}

func TestOnPrimaryWhenEveryMemberFailsIsTheLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		for _, h := range r.hsms {
			h.set(func(h *hsm) {
				h.refusal = errors.New("no power")
				h.fault = func(pluginproto.Command) error { return errDevice() }
			})
		}
		_, err := r.OnPrimary(t.Context(), func(ctx context.Context, m group.Member) error {
			_, err := m.List(ctx)
			return err
		})
		if !errors.Is(err, group.ErrLost) || pluginproto.CKROf(err) != pluginproto.CKRDeviceError {
			t.Errorf("got %v", err)
		}
		r.wantGroup(api.GroupLost)
	})
}

func TestAKeyOperationOnAPrimaryThatFreezesGoesOnElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		r.hsms["a"].freeze()
		began := time.Now()
		n := 0
		by, err := r.OnPrimary(t.Context(), func(ctx context.Context, m group.Member) error {
			n++
			_, err := m.Generate(ctx, pluginproto.KeySpec{ID: keyID(n)})
			return err
		})
		if by != "b" || err != nil || time.Since(began) > 2150*time.Millisecond {
			t.Errorf("made on %q with %v after %v, want b after 2 s", by, err, time.Since(began))
		}
		r.hsms["a"].thaw()
		elapse(time.Second)
		r.wantState("a", api.MemberActive)
	})
}

func TestOnEachRunsOnAllThatAreInStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b", "s*", "d"}, nil)
		r.hsms["d"].refusal = errors.New("no power")
		r.start()
		for _, h := range r.hsms {
			h.set(func(h *hsm) { h.delay = time.Second })
		}
		r.hsms["b"].set(func(h *hsm) { h.fault = func(pluginproto.Command) error { return errDevice() } })
		began := time.Now()
		destroy := func(ctx context.Context, m group.Member) error { return m.Destroy(ctx, keyID(1)) }
		got := r.OnEach(t.Context(), nil, destroy)
		if len(got) != 3 || got["a"] != nil || got["s"] != nil || pluginproto.ClassOf(got["b"]) != pluginproto.ClassMember {
			t.Errorf("got %v, want success on a and s and the fault of b", got)
		}
		if d := time.Since(began); d != time.Second {
			t.Errorf("it took %v, want all at the same time", d)
		}
		if n := r.told("b", api.MemberActive, api.MemberDown); n != 1 {
			t.Errorf("b was lost %d times, want once", n)
		}
		got = r.OnEach(t.Context(), []string{"d", "a", "nobody", "a"}, destroy)
		if len(got) != 3 || got["a"] != nil || !errors.Is(got["d"], group.ErrNotInStep) || !errors.Is(got["nobody"], group.ErrUnknownMember) {
			t.Errorf("got %v", got)
		}
	})
}

func TestADestroyNeverOvertakesTheGenerateItUndoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a"}, nil).start()
		r.hsms["a"].set(func(h *hsm) { h.delay = 500 * time.Millisecond })
		m, err := r.Member("a")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := m.Generate(ctx, pluginproto.KeySpec{ID: keyID(1)}); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("generating: %v", err)
		}
		r.hsms["a"].set(func(h *hsm) { h.delay = 0 })
		if err := m.Destroy(t.Context(), keyID(1)); err != nil {
			t.Fatal(err)
		}
		elapse(time.Second)
		if n := len(r.hsms["a"].keys); n != 0 {
			t.Error("the abandoned key came to be after it was destroyed")
		}
	})
}

func TestAMemberIsNoGoodAfterItsLinkIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil).start()
		m, err := r.Member("a")
		if err != nil {
			t.Fatal(err)
		}
		if m.Name() != "a" || m.Token().Label != "a" {
			t.Errorf("lent %q with token %q", m.Name(), m.Token().Label)
		}
		r.hsms["a"].crash()
		elapse(time.Second)
		r.wantState("a", api.MemberActive) // on another link
		var me *group.MemberError
		if _, err := m.List(t.Context()); pluginproto.ClassOf(err) != pluginproto.ClassMember || !errors.As(err, &me) {
			t.Errorf("the old one says %v", err)
		}
		if n := r.told("a", api.MemberActive, api.MemberDown); n != 1 {
			t.Errorf("the member was lost %d times, want once", n)
		}
	})
}

// ledger is what a catalog would be: the keys that all members should hold.
type ledger struct {
	mu   sync.Mutex // guards keys
	keys []pluginproto.KeyID
}

func (l *ledger) add(id pluginproto.KeyID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keys = append(l.keys, id)
}

func (l *ledger) all() []pluginproto.KeyID {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.keys)
}

// admitWith makes an Admit of one that bars nothing.
func admitWith(admit func(context.Context, group.Member, bool) error) func(context.Context, group.Member, bool) (group.Admission, error) {
	return func(ctx context.Context, m group.Member, last bool) (group.Admission, error) {
		return group.Admission{}, admit(ctx, m, last)
	}
}

func TestAdmissionMissesNoKeyOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var book ledger
		r := newRig(t, three, func(c *group.Config) {
			c.Admit = admitWith(func(ctx context.Context, m group.Member, last bool) error {
				have, err := m.List(ctx)
				if err != nil {
					return err
				}
				for _, id := range book.all() {
					if !slices.ContainsFunc(have, func(o pluginproto.Object) bool { return o.ID == id }) {
						if _, err := m.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneTarget, Protocol: "memory", Keys: []pluginproto.KeyID{id}}); err != nil {
							return err
						}
					}
				}
				return nil
			})
		}).start()
		for _, h := range r.hsms {
			h.set(func(h *hsm) { h.delay = time.Millisecond })
		}
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for worker := range 3 {
			wg.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					release, err := r.Lease(t.Context())
					if err != nil {
						t.Error(err)
						return
					}
					id := keyID(worker*1_000_000 + i)
					made := 0
					for _, err := range r.OnEach(t.Context(), nil, func(ctx context.Context, m group.Member) error {
						_, err := m.Generate(ctx, pluginproto.KeySpec{ID: id})
						return err
					}) {
						if err == nil {
							made++
						}
					}
					if made > 0 {
						book.add(id)
					}
					release()
					elapse(time.Millisecond)
				}
			})
		}
		for i := range 30 {
			elapse(77 * time.Millisecond)
			r.hsms[three[i%3]].crash()
		}
		close(stop)
		wg.Wait()
		elapse(time.Minute)
		r.wantGroup(api.GroupNormal)
		keys := book.all()
		for name, h := range r.hsms {
			for _, id := range keys {
				if !h.keys[id] {
					t.Errorf("member %s lacks key %v of %d", name, id, len(keys))
				}
			}
		}
	})
}

func TestAnAdmissionThatFailsIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var looks []bool
		r := newRig(t, []string{"a"}, func(c *group.Config) {
			c.Admit = admitWith(func(_ context.Context, _ group.Member, last bool) error {
				looks = append(looks, last)
				if len(looks) <= 3 {
					return errors.New("the catalog is not there")
				}
				return nil
			})
		}).start()
		if m := r.member("a"); m.State != api.MemberDown || m.Reason != "the catalog is not there" {
			t.Errorf("the member is %s: %s", m.State, m.Reason)
		}
		elapse(10 * time.Second)
		r.wantState("a", api.MemberActive)
		if want := []bool{false, false, false, false, true}; !slices.Equal(looks, want) {
			t.Errorf("looks under the lease: %v, want %v", looks, want)
		}
	})
}

func TestStatusShowsWhatIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "s*"}, func(c *group.Config) { c.MinCopies = 2 }).start()
		r.hsms["a"].set(func(h *hsm) { h.delay = 3 * time.Millisecond })
		for range 100 {
			r.mustDo()
		}
		s := r.Status()
		if s.Name != "g" || s.MinCopies != 2 || s.Primary != "a" || s.State != api.GroupNormal {
			t.Errorf("the group shows %+v", s)
		}
		a, b := s.Members[0], s.Members[1]
		if a.Role != "active" || b.Role != "standby" || b.State != api.MemberStandby {
			t.Errorf("the members show %+v and %+v", a, b)
		}
		if a.Commands != 100 || a.Errors != 0 || a.DriverPID != 100 || a.Token.Serial != "serial of a" || a.Driver != "fake" {
			t.Errorf("the member shows %+v", a)
		}
		if a.LatencyP50 < 3000 || a.LatencyP50 > 3500 || a.LatencyP99 < a.LatencyP50 {
			t.Errorf("latencies are %d and %d µs, want 3 ms", a.LatencyP50, a.LatencyP99)
		}
		if names := r.Names(); !slices.Equal(names, []string{"a", "s"}) {
			t.Errorf("the names are %v", names)
		}
	})
}

func TestNewNamesEveryFault(t *testing.T) {
	connect := newHSM("x").connect
	_, err := group.New(group.Config{Name: "g", ProbeInterval: -1, Members: []group.MemberConfig{
		{Name: "a", Connect: connect}, {Name: "a", Connect: connect}, {Connect: connect}, {Name: "c"},
	}})
	want := `group "g": probe interval is negative: -1ns
group "g": two members are named "a"
group "g": member 3 has no name
group "g": member "c" has no way to connect`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
	if _, err := group.New(group.Config{}); err == nil {
		t.Error("a group without members was made")
	}
}

func TestEveryCallOfAMemberReachesItsDriver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a"}, nil).start()
		m, err := r.Member("a")
		if err != nil {
			t.Fatal(err)
		}
		calls := map[string]func(context.Context) error{
			"list":           func(ctx context.Context) error { _, err := m.List(ctx); return err },
			"inspect":        func(ctx context.Context) error { _, err := m.Inspect(ctx, keyID(1)); return err },
			"generate":       func(ctx context.Context) error { _, err := m.Generate(ctx, pluginproto.KeySpec{}); return err },
			"set attributes": func(ctx context.Context) error { return m.SetAttributes(ctx, keyID(1), pluginproto.Attributes{}) },
			"destroy":        func(ctx context.Context) error { return m.Destroy(ctx, keyID(1)) },
			"clone": func(ctx context.Context) error {
				_, err := m.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: "memory", Keys: []pluginproto.KeyID{keyID(1)}})
				return err
			},
			"do": func(ctx context.Context) error { _, err := m.Do(ctx, encrypt); return err },
		}
		wrong := pluginproto.Errorf(pluginproto.ClassCaller, "asking", "it makes no sense")
		for name, call := range calls { // slower than their callers wait, faster than a member that is silent
			r.hsms["a"].set(func(h *hsm) { h.fault, h.delay = nil, 0 })
			if err := call(t.Context()); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			r.hsms["a"].set(func(h *hsm) {
				h.fault = func(cmd pluginproto.Command) error {
					if cmd.Op == pluginproto.OpProbe {
						return nil
					}
					return wrong
				}
			})
			if err := call(t.Context()); !errors.Is(err, wrong) || err.Error() != "member a: asking: it makes no sense" {
				t.Errorf("%s: got %v, want the driver's answer with the member's name", name, err)
			}
			r.hsms["a"].set(func(h *hsm) { h.delay = 1500 * time.Millisecond })
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			began := time.Now()
			if err := call(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
				t.Errorf("%s: got %v after %v, want the deadline", name, err, time.Since(began))
			}
			if err := call(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: after the deadline: %v", name, err)
			}
			cancel()
			elapse(3 * time.Second)
		}
		r.Close()
		for name, call := range calls {
			if err := call(t.Context()); err == nil {
				t.Errorf("%s: a closed group answered", name)
			}
		}
	})
}

func TestAKeyOperationWaitsForAMemberThatIsJustComingBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a"}, func(c *group.Config) {
			connect := c.Members[0].Connect
			c.Members[0].Connect = func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
				elapse(time.Second)
				return connect(ctx)
			}
		}).start()
		nothing := func(context.Context, group.Member) error { return nil }
		r.hsms["a"].crash()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := r.OnPrimary(ctx, nothing); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with less time than the member needs: %v", err)
		}
		if by, err := r.OnPrimary(t.Context(), nothing); by != "a" || err != nil {
			t.Errorf("made on %q with %v", by, err)
		}
		r.hsms["a"].set(func(h *hsm) { h.refusal = errors.New("no power") })
		r.hsms["a"].crash()
		synctest.Wait()
		began := time.Now()
		_, err := r.OnPrimary(t.Context(), nothing)
		if !errors.Is(err, group.ErrLost) || time.Since(began) > 2100*time.Millisecond {
			t.Errorf("got %v after %v, want the loss after 2 s at most", err, time.Since(began))
		}
		want := "group g: no member of the group can serve: CKR_DEVICE_ERROR"
		if err.Error() != want {
			t.Errorf("got %q, want %q", err, want)
		}
		r.Close()
		if _, err := r.OnPrimary(t.Context(), nothing); !errors.Is(err, group.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}

func TestAKeyOperationOnAFrozenMemberEndsWithinOneProbeInterval(t *testing.T) {
	for _, idle := range []time.Duration{0, 300 * time.Millisecond, 990 * time.Millisecond, 1900 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, three, nil).start()
			m, err := r.Member("b")
			if err != nil {
				t.Fatal(err)
			}
			elapse(10*time.Second + idle) // whatever it proved last, it proved that long ago
			r.hsms["b"].freeze()
			began := time.Now()
			_, err = m.Generate(t.Context(), pluginproto.KeySpec{ID: keyID(1)})
			if took := time.Since(began); pluginproto.ClassOf(err) != pluginproto.ClassMember || took > 2150*time.Millisecond {
				t.Errorf("idle for %v: got %v after %v, want the loss of the member after 2 s", idle, err, took)
			}
			r.wantState("b", api.MemberProbing)
		})
	}
}

func TestAMemberMayTakeItsTimeForAKeyWhileItAnswersProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, nil).start()
		m, err := r.Member("b")
		if err != nil {
			t.Fatal(err)
		}
		r.hsms["b"].set(func(h *hsm) { h.keyDelay = time.Minute }) // a long RSA key on a slow HSM
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		if _, err := m.Generate(ctx, pluginproto.KeySpec{ID: keyID(1)}); err != nil {
			t.Error(err)
		}
		if path := r.path("b"); len(path) != 3 {
			t.Errorf("the member went through %v, want no more than its start", path)
		}
	})
}

func TestOnPrimaryLeavesWhatIsPassedToTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b", "c"}, nil).start()
		by, err := r.OnPrimary(t.Context(), func(_ context.Context, m group.Member) error {
			if m.Name() == "a" {
				return group.ErrPassed
			}
			return nil
		})
		if by != "b" || err != nil {
			t.Errorf("done on %q, %v", by, err)
		}
		_, err = r.OnPrimary(t.Context(), func(context.Context, group.Member) error { return group.ErrPassed })
		if !errors.Is(err, group.ErrPassed) || errors.Is(err, group.ErrLost) {
			t.Errorf("passed by all: %v", err)
		}
		r.wantGroup(api.GroupNormal)
	})
}
