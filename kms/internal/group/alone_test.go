package group_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// TestW1_ALoneCommandLeavesAMemberThatFreezes: nobody else has asked anything, so the
// silence of one member has nothing to be held against but the answers to probes.
func TestW1_ALoneCommandLeavesAMemberThatFreezes(t *testing.T) {
	for _, c := range []struct {
		name    string
		members []string
		freeze  []string
		spent   bool   // the budget for slow commands
		by      string // "": any
	}{
		{"with a budget", three, []string{"a"}, false, ""},
		{"without a budget", three, []string{"a", "b"}, true, "c"},
		{"the only active member, beside a standby", []string{"a", "s*"}, []string{"a"}, true, "s"},
		{"the only active member, beside two standbys of which one freezes too", []string{"a", "s*", "t*"}, []string{"a", "s"}, true, "t"},
		{"all active members, beside a standby", []string{"a", "b", "s*"}, []string{"a", "b"}, true, "s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, c.members, hedged).start()
				if c.spent {
					r.spendBudget()
				}
				elapse(time.Minute + time.Second/2)
				for _, name := range c.freeze {
					r.hsms[name].freeze()
				}
				for range 3 {
					began := time.Now()
					by := r.mustDo()
					if took := time.Since(began); took >= 50*time.Millisecond || (c.by != "" && by != c.by) {
						t.Errorf("the answer came from %s after %v", by, took)
					}
				}
				r.wantState("a", api.MemberActive) // there was no time to find it silent
				for _, name := range c.freeze {
					r.hsms[name].thaw()
				}
				elapse(time.Second)
				r.wantGroup(api.GroupNormal)
				for range 10 {
					if by := r.mustDo(); by == "s" || by == "t" {
						t.Error("a standby serves after an active member has answered again")
					}
				}
			})
		})
	}
}

// spendBudget has commands hedged until that can be afforded no more.
func (r *rig) spendBudget() {
	for _, h := range r.hsms {
		h.set(func(h *hsm) { h.delay = 12 * time.Millisecond })
	}
	for range 30 {
		r.mustDo()
	}
	for _, h := range r.hsms {
		h.set(func(h *hsm) { h.delay = 0 })
	}
	for range 5000 { // what is long is short again
		r.mustDo()
	}
}

// TestACommandThatTakesLongStaysWhereItIs: a member that answers probes meanwhile does
// not hang, and a standby is no place for what is only slow.
func TestACommandThatTakesLongStaysWhereItIs(t *testing.T) {
	for name, members := range map[string][]string{
		"in a group":                               three,
		"on the only active member":                {"a", "s*"},
		"on the only active member, two stand by":  {"a", "s*", "t*"},
		"on one of two active members, one stands": {"a", "b", "s*"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, members, hedged).start()
				for range 100 {
					r.mustDo()
				}
				for _, h := range r.hsms {
					h.set(func(h *hsm) {
						h.work = func() time.Duration { return 300 * time.Millisecond }
						h.probed = func() time.Duration { return 100 * time.Microsecond }
					})
				}
				const commands = 20
				for range commands {
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					if _, err := r.Do(ctx, pluginproto.Command{Op: pluginproto.OpSign, Mech: pluginproto.RSAPSS, Hash: pluginproto.SHA256, Input: make([]byte, 32)}); err != nil {
						t.Error(err)
					}
					cancel()
				}
				elapse(time.Second)
				served := -100
				for name, h := range r.hsms {
					n, _, _ := h.count()
					served += n
					if (name == "s" || name == "t") && n > 0 {
						t.Errorf("standby %s served %d commands", name, n)
					}
				}
				if extra := served - commands; extra > 12 {
					t.Errorf("%d commands were carried out %d times", commands, served)
				}
			})
		})
	}
}

// TestAMemberThatIsMuchSlowerThanTheOthersStillHelps: it is silent for long, again and
// again, and answers every time.
func TestAMemberThatIsMuchSlowerThanTheOthersStillHelps(t *testing.T) {
	for _, c := range []struct {
		name    string
		slow    time.Duration // of one command on the slow member; the others take 1 ms
		callers int
	}{
		{"5 times, few callers", 5 * time.Millisecond, 3},
		{"20 times, few callers", 20 * time.Millisecond, 3},
		{"20 times, many callers", 20 * time.Millisecond, 64},
		{"200 times, many callers", 200 * time.Millisecond, 64},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, three, hedged).start()
				for name, h := range r.hsms {
					h.set(func(h *hsm) {
						h.turn, h.delay = make(chan struct{}, 1), time.Millisecond
						if name == "a" {
							h.delay = c.slow
						}
					})
				}
				stop := make(chan struct{})
				l := &load{r: r}
				l.callers(c.callers, stop)
				elapse(10 * time.Second)
				close(stop)
				l.wg.Wait()
				elapse(5 * time.Second)
				served := 0
				for _, h := range r.hsms {
					n, _, _ := h.count()
					served += n
				}
				slow, _, _ := r.hsms["a"].count()
				most := int(10 * time.Second / c.slow)
				if extra := served - l.sent; extra > l.sent/20 || slow < most/2 || slow > most+100 {
					t.Errorf("%d commands, %d extra; the slow member served %d, and could have served %d", l.sent, extra, slow, most)
				}
				t.Logf("%d commands, %d extra, longest %v; the slow member served %d of at most %d", l.sent, served-l.sent, l.longest, slow, most)
				r.wantGroup(api.GroupNormal)
			})
		})
	}
}
