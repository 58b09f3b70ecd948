package group_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// TestOperatorsWhoAreAtTheSameMembersAtOnceAllGetAnAnswer has many of them add, remove,
// replace, drain and recover the same few members at random, while these break and
// commands run. Each call ends: in its time, when that is short, and by itself, when it
// has all the time. A member has one driver at a time, what is told of it is a chain of
// states, and nothing is left of it when it has gone.
func TestOperatorsWhoAreAtTheSameMembersAtOnceAllGetAnAnswer(t *testing.T) {
	for seed := range uint64(3) {
		for _, manual := range []bool{false, true} {
			t.Run(fmt.Sprintf("seed %d, manual recovery %t", seed, manual), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { operate(t, rand.New(rand.NewPCG(seed, 2)), manual) })
			})
		}
	}
}

func operate(t *testing.T, dice *rand.Rand, manual bool) {
	names := []string{"a", "b", "c", "d"}
	r := newRig(t, append(names, "s*"), func(c *group.Config) {
		c.Hedge = true
		c.Recovery = group.Recovery{Manual: manual, Interval: 5 * time.Second}
		c.Admit = admitAtRandom(rand.New(rand.NewPCG(dice.Uint64(), 3)))
	})
	for _, h := range r.hsms {
		h.delay = 3 * time.Millisecond
		h.alone = func() { t.Errorf("two drivers of %s run at once", h.name) }
	}
	r.start()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() { r.press(rand.New(rand.NewPCG(7, uint64(i))), stop) })
	}
	wg.Go(func() { r.makeKeys(rand.New(rand.NewPCG(8, 1)), stop) })
	for i := range 6 {
		own := rand.New(rand.NewPCG(dice.Uint64(), uint64(i)))
		wg.Go(func() {
			for !closed(stop) {
				r.operate(own, names[own.IntN(len(names))])
				elapse(time.Duration(own.IntN(500)) * time.Millisecond)
			}
		})
	}
	for range 30 {
		elapse(time.Duration(dice.IntN(2000)) * time.Millisecond)
		r.hsms[names[dice.IntN(len(names))]].suffer(dice)
	}
	for _, h := range r.hsms {
		h.recover()
	}
	close(stop)
	wg.Wait()
	r.Close()
	r.wantChains()
	for _, h := range r.hsms {
		for i, c := range h.conns {
			if !closed(c.done) {
				t.Errorf("driver %d of %s still runs", i, h.name)
			}
		}
	}
}

// admitAtRandom takes its time, and now and then refuses.
func admitAtRandom(dice *rand.Rand) func(context.Context, group.Member, bool) (group.Admission, error) {
	var mu sync.Mutex // guards dice
	return func(ctx context.Context, m group.Member, _ bool) (found group.Admission, err error) {
		mu.Lock()
		pause, outcome := time.Duration(dice.IntN(100))*time.Millisecond, dice.IntN(12)
		mu.Unlock()
		select {
		case <-time.After(pause + 1):
		case <-ctx.Done():
			return found, ctx.Err()
		}
		switch outcome {
		case 0:
			return found, errors.New("the catalog does not answer")
		case 1:
			found.Barred = []pluginproto.KeyID{keyID(1)}
		}
		_, err = m.List(ctx)
		return found, err
	}
}

// operate does one thing to one member.
func (r *rig) operate(dice *rand.Rand, name string) {
	limit, long := time.Duration(1+dice.IntN(3000))*time.Millisecond, dice.IntN(2) == 0
	if long {
		limit = time.Hour
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	spec := group.MemberConfig{Name: name, Driver: "fake", Standby: dice.IntN(5) == 0, Drained: dice.IntN(5) == 0, Connect: r.hsms[name].connect}
	began := time.Now()
	var what string
	var err error
	switch force := dice.IntN(2) == 0; dice.IntN(11) {
	case 0, 1:
		what, err = "adding", r.Add(ctx, spec)
	case 2:
		what, err = "removing", r.Remove(ctx, name, force)
	case 3:
		what, err = "replacing", r.Replace(ctx, spec)
	case 4:
		what, err = "draining", r.Drain(ctx, name, force)
	case 5, 6:
		what, err = "resuming", r.Resume(ctx, name)
	case 7:
		what, err = "recovering", r.Recover(ctx, name)
	case 8:
		what, err = "readmitting", r.Readmit(ctx, name)
	case 9:
		what = "recovering all"
		r.Reinitialize(ctx)
	default:
		what, err = "changing the role of", r.SetStandby(name, dice.IntN(2) == 0, force)
		r.Bar(name, []pluginproto.KeyID{keyID(1)})
		if dice.IntN(4) == 0 {
			r.Distrust(name, errors.New("it has lied"))
		}
	}
	took := time.Since(began)
	switch {
	case long && took > 5*time.Minute:
		r.t.Errorf("%s %s took %v: %v", what, name, took, err)
	case took > limit+slack:
		r.t.Errorf("%s %s with a limit of %v took %v", what, name, limit, took)
	}
}

// wantChains checks that each member was told to leave the state that it was told to
// have come to, also across the changes of its configuration.
func (r *rig) wantChains() {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	at := map[string]string{}
	for i, e := range r.events {
		key := e.Type + " " + e.Member
		switch {
		case e.Type != api.EventMember && e.Type != api.EventGroup, e.To == "joined":
			continue
		case at[key] != "" && at[key] != e.From:
			r.t.Errorf("event %d: %s leaves %s for %s, but was %s", i, key, e.From, e.To, at[key])
		case at[key] == "" && e.Type == api.EventMember && e.From != string(api.MemberDown) && e.From != string(api.MemberDraining):
			r.t.Errorf("event %d: %s begins as %s", i, key, e.From)
		}
		at[key] = e.To
		if e.To == "removed" {
			delete(at, key)
		}
	}
}

// TestAMemberThatIsLostTheMomentItsDrainEndsIsAnswered: when recovery is manual, nobody
// makes another attempt for the one who waits.
func TestAMemberThatIsLostTheMomentItsDrainEndsIsAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, func(c *group.Config) { c.Recovery.Manual = true }).start()
		for range 200 {
			if err := r.Drain(t.Context(), "b", false); err != nil {
				t.Fatal(err)
			}
			r.hsms["b"].crash()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			if err := r.Resume(ctx, "b"); errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
			cancel()
			synctest.Wait()
			if err := r.Recover(t.Context(), "b"); err != nil {
				t.Fatal(err)
			}
			r.wantState("b", api.MemberActive)
		}
	})
}

// TestAMemberThatIsLostTheMomentItIsConnectedCannotJoin: it is lost before it could be
// brought in step, and with manual recovery there is no other attempt.
func TestAMemberThatIsLostTheMomentItIsConnectedCannotJoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, three, func(c *group.Config) { c.Recovery.Manual = true }).start()
		for i := range 200 {
			name := fmt.Sprint("m", i)
			spec := r.spec(name)
			r.hsms[name].fault = func(cmd pluginproto.Command) error {
				r.hsms[name].crash()
				return nil
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			err := r.Add(ctx, spec)
			cancel()
			if errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
			if err == nil { // it was quicker
				if err := r.Remove(t.Context(), name, false); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

func TestWhoWaitsForADrainThatIsEndedIsTold(t *testing.T) {
	for name, leave := range map[string]func(*rig, context.Context) error{
		"draining":  func(r *rig, ctx context.Context) error { return r.Drain(ctx, "b", false) },
		"removing":  func(r *rig, ctx context.Context) error { return r.Remove(ctx, "b", false) },
		"replacing": func(r *rig, ctx context.Context) error { return r.Replace(ctx, r.spec("b")) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, three, nil).start()
				r.slow(300 * time.Millisecond)
				stop := r.load(9)
				elapse(100 * time.Millisecond)
				told := make(chan error, 1)
				go func() { told <- leave(r, t.Context()) }()
				elapse(50 * time.Millisecond)
				if err := r.Resume(t.Context(), "b"); err != nil {
					t.Error(err)
				}
				elapse(100 * time.Millisecond) // with commands on it, again
				select {
				case err := <-told:
					if !errors.Is(err, group.ErrOvertaken) {
						t.Errorf("got %v", err)
					}
				default:
					t.Error("nobody is told")
				}
				elapse(time.Second)
				stop()
				r.wantState("b", api.MemberActive)
			})
		})
	}
}
