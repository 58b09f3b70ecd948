package group_test

import (
	"context"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// askEvery is within which time every member is asked for its facts once.
const askEvery = 31 * time.Second

var (
	roomy = pluginproto.Fact{Name: "storage", Value: "40 % used"}
	full  = pluginproto.Fact{Name: "storage", Value: "97 % used", Warning: true}
	model = pluginproto.Fact{Name: "protocols", Value: "cpv4, cpv3"}
)

func (h *hsm) tell(facts ...pluginproto.Fact) { h.set(func(h *hsm) { h.facts = facts }) }

func (h *hsm) timesAsked() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.asked
}

// facts returns what the group has told of the facts of its members.
func (r *rig) facts() (all []string) {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if e.Type != api.EventFact {
			continue
		}
		text := e.Member + " " + e.To + " " + e.Cause
		if e.Alarm {
			text += " !"
		}
		all = append(all, text)
	}
	return all
}

func (r *rig) wantFacts(want ...string) {
	r.t.Helper()
	if got := r.facts(); !slices.Equal(got, want) {
		r.t.Fatalf("told %q, want %q", got, want)
	}
}

func TestWhoIsInStepIsAskedForFactsEveryHalfMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b", "s*"}, func(c *group.Config) { c.Recovery.Manual = true }).start()
		r.hsms["b"].crash()
		r.wantState("b", api.MemberDown)
		elapse(2*askEvery + askEvery/2)
		for name, want := range map[string]int{"a": 2, "s": 2, "b": 0} {
			if n := r.hsms[name].timesAsked(); n != want {
				t.Errorf("%s was asked %d times, want %d", name, n, want)
			}
		}
		r.hsms["a"].tell(roomy, model)
		elapse(askEvery)
		want := []api.Fact{{Name: "storage", Value: "40 % used"}, {Name: "protocols", Value: "cpv4, cpv3"}}
		if got := r.member("a").Token.Facts; !slices.Equal(got, want) {
			t.Errorf("status has %v, want %v", got, want)
		}
		if got := r.member("s").Token.Facts; len(got) != 0 {
			t.Errorf("status of the other one has %v", got)
		}
		r.wantFacts()
	})
}

func TestAWarningIsToldWhenItComesAndWhenItGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil)
		r.hsms["a"].tell(full)
		r.start()
		told := []string{"a warning storage: 97 % used !"}
		r.wantFacts(told...)
		for _, step := range []struct {
			name  string
			facts []pluginproto.Fact
			told  string // "" means nothing
		}{
			{"it is the same", []pluginproto.Fact{full, model}, ""},
			{"it is worse", []pluginproto.Fact{{Name: "storage", Value: "98 % used", Warning: true}}, ""},
			{"it is over", []pluginproto.Fact{roomy}, "a mended storage: 40 % used"},
			{"it is back", []pluginproto.Fact{full}, "a warning storage: 97 % used !"},
			{"it is not spoken of", []pluginproto.Fact{model}, "a mended storage: it is told no more"},
			{"something else is a warning", []pluginproto.Fact{roomy, {Name: "clock", Value: "3 h behind", Warning: true}}, "a warning clock: 3 h behind !"},
		} {
			r.hsms["a"].tell(step.facts...)
			elapse(askEvery)
			if step.told != "" {
				told = append(told, step.told)
			}
			if got := r.facts(); !slices.Equal(got, told) {
				t.Fatalf("%s: told %q, want %q", step.name, got, told)
			}
		}
		if n := r.told("a", api.MemberActive, api.MemberActive); n > 0 {
			t.Errorf("%d transitions were told besides", n)
		}
	})
}

// A warning of a token that comes and goes is no news each time.
func TestAWarningOutlivesALoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil)
		r.hsms["a"].tell(full)
		r.start()
		r.hsms["a"].set(func(h *hsm) { h.refusal = errDevice() })
		r.hsms["a"].crash()
		r.wantState("a", api.MemberDown)
		if got := r.member("a").Token.Facts; len(got) != 1 || !got[0].Warning {
			t.Errorf("facts of a member that is away: %v", got)
		}
		r.hsms["a"].set(func(h *hsm) { h.refusal = nil })
		elapse(5 * time.Second)
		r.wantState("a", api.MemberActive)
		r.wantFacts("a warning storage: 97 % used !")
		r.hsms["a"].tell(roomy)
		r.hsms["a"].crash()
		elapse(5 * time.Second)
		r.wantFacts("a warning storage: 97 % used !", "a mended storage: 40 % used")
	})
}

func TestFactsThatCannotBeHad(t *testing.T) {
	for _, x := range []struct {
		name string
		err  error
		want api.MemberState
	}{
		{"a driver that does not know keeps its member", pluginproto.Errorf(pluginproto.ClassUnknown, "asking", "the library has no such function"), api.MemberActive},
		{"a token that is busy keeps it", pluginproto.Errorf(pluginproto.ClassBusy, "asking", "no session is free"), api.MemberActive},
		{"a token that is lost does not", errDevice(), api.MemberDown},
	} {
		t.Run(x.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, []string{"a", "b"}, func(c *group.Config) { c.Recovery.Manual = true })
				r.hsms["a"].tell(full)
				r.start()
				r.hsms["a"].set(func(h *hsm) { h.noFacts = x.err })
				elapse(askEvery + time.Second)
				r.wantState("a", x.want)
				if got := r.member("a").Token.Facts; len(got) != 1 || got[0].Value != full.Value {
					t.Errorf("what it said before is %v", got)
				}
				r.wantFacts("a warning storage: 97 % used !")
			})
		})
	}
}

func TestAMemberThatIsLateIsNotAskedForFacts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, func(c *group.Config) { c.ProbeInterval = 20 * time.Second })
		r.start()
		elapse(askEvery - 5*time.Second)
		r.hsms["a"].freeze()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _ = r.Do(ctx, encrypt)
		_, _ = r.Do(ctx, encrypt) // one of them is with the member that hangs
		elapse(12 * time.Second)
		r.wantState("a", api.MemberActive)
		if a, b := r.hsms["a"].timesAsked(), r.hsms["b"].timesAsked(); a != 0 || b != 1 {
			t.Errorf("asked %d and %d times, want 0 and 1", a, b)
		}
		r.hsms["a"].thaw()
		elapse(time.Second)
		if n := r.hsms["a"].timesAsked(); n != 1 {
			t.Errorf("asked %d times since it answers, want 1", n)
		}
	})
}

func TestAskingForFactsNowWaitsForNobodyWhoHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, []string{"a", "b"}, nil).start()
		r.hsms["a"].tell(full)
		r.hsms["b"].freeze()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		r.AskFacts(ctx)
		if took := time.Since(began); took != time.Second {
			t.Errorf("took %v, want the second that it had", took)
		}
		r.wantFacts("a warning storage: 97 % used !")
		r.hsms["b"].thaw()
		elapse(time.Second)
		r.wantState("b", api.MemberActive)
	})
}

// teller is a driver whose first answer is as old as its question when it comes.
type teller struct {
	group.Conn
	late *atomic.Int64 // of the next answer, in nanoseconds
}

func (c teller) Facts(ctx context.Context) ([]pluginproto.Fact, error) {
	late := time.Duration(c.late.Swap(0))
	facts, err := c.Conn.Facts(ctx)
	if late > 0 {
		elapse(late)
	}
	return facts, err
}

func TestAnOlderAnswerDoesNotOverruleANewerOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var late atomic.Int64
		late.Store(int64(time.Second))
		r := newRig(t, []string{"a"}, func(c *group.Config) {
			connect := c.Members[0].Connect
			c.Members[0].Connect = func(ctx context.Context) (group.Conn, pluginproto.TokenInfo, error) {
				conn, token, err := connect(ctx)
				return teller{conn, &late}, token, err
			}
		})
		r.hsms["a"].tell(full)
		r.start()
		for late.Load() > 0 { // until the group asks by itself
			elapse(10 * time.Millisecond)
		}
		elapse(time.Millisecond)
		r.hsms["a"].tell(roomy)
		r.AskFacts(t.Context())
		elapse(5 * time.Second)
		r.wantFacts("a warning storage: 97 % used !", "a mended storage: 40 % used")
		if got := r.member("a").Token.Facts; !slices.Equal(got, []api.Fact{{Name: "storage", Value: "40 % used"}}) {
			t.Errorf("status has %v", got)
		}
	})
}
