package kms_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// limit has the next drivers of a member say something else of how keys are cloned.
func limit(r *rig, member int, cloning func([]pluginproto.CloneProtocol)) (on *atomic.Bool) {
	on = new(atomic.Bool)
	plain := r.group.Members[member].Open
	r.group.Members[member].Open = func(ctx context.Context) (pluginproto.Driver, error) {
		d, err := plain(ctx)
		if err != nil || !on.Load() {
			return d, err
		}
		return &disguised{d, func(i *pluginproto.TokenInfo) { cloning(i.Cloning) }}, nil
	}
	return on
}

// A member that was admitted once may come back with other firmware.
func TestCheckSaysWhoCannotGiveKeysToWhom(t *testing.T) {
	for _, c := range []struct {
		name    string
		cloning func([]pluginproto.CloneProtocol)
		member  string
		fault   bool
		text    string
	}{
		{"a member takes keys and gives none", func(p []pluginproto.CloneProtocol) { p[0].Gives = false },
			"hsm-b", false, "cannot be given keys by member hsm-c, so what only that one holds does not reach it"},
		{"a member gives keys and takes none", func(p []pluginproto.CloneProtocol) { p[0].Takes = false },
			"hsm-c", true, "no member can give it keys, so it will not hold what is made from now on"},
		{"a member shares no protocol with the others", func(p []pluginproto.CloneProtocol) { p[0].Name = "cpv1" },
			"hsm-c", true, "hsm-a gives keys away by memory, hsm-c takes them by cpv1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3)
				limited := limit(r, 2, c.cloning)
				r.mustStart()
				defer r.stop()
				r.create("shop")
				limited.Store(true)
				r.hsms[2].leave()
				r.wantStates(active, active, down)
				r.hsms[2].come()
				r.wantStates(active, active, active)
				got := r.checkGroup()
				wantFinding(t, got, c.member, c.fault, c.text)
				if faults := slices.DeleteFunc(got.Findings, func(f api.Finding) bool { return !f.Fault }); len(faults) > 1 || got.OK == c.fault {
					t.Errorf("OK is %v, faults %+v", got.OK, faults)
				}
				r.wantConsistent()
			})
		})
	}
}

// Luna's own groups cannot make keys while their primary has newer firmware than the others.
func TestKeysAreMadeWhereTheyCanBeGivenToTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3)
		upgraded := limit(r, 0, func(p []pluginproto.CloneProtocol) { p[0].Gives = false })
		r.mustStart()
		defer r.stop()
		upgraded.Store(true)
		r.hsms[0].leave()
		r.wantStates(down, active, active)
		r.hsms[0].come()
		r.wantStates(active, active, active)
		if p := r.Status().Groups[0].Primary; p != "hsm-a" {
			t.Fatalf("the primary is %s", p)
		}
		began := time.Now()
		r.create("shop")
		if took := time.Since(began); took > 0 {
			t.Errorf("took %v", took)
		}
		r.wantConsistent()
		// When the others are lost at it, it makes keys as anybody does.
		for _, h := range r.hsms[1:] {
			h.driver().Script(memdriver.Fault{Call: memdriver.CallGenerate, Err: &pluginproto.Error{
				Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "generating"}})
		}
		if _, err := r.CreateMasterKey(t.Context(), "dusk", kms.KeyOptions{AllowDegraded: true}); err != nil {
			t.Error(err)
		}
		r.wantStates(active, active, active)
		r.hsms[1].leave()
		r.hsms[2].leave()
		r.wantStates(active, down, down)
		if _, err := r.CreateMasterKey(t.Context(), "night", kms.KeyOptions{AllowDegraded: true}); err != nil {
			t.Error(err)
		}
	})
}

func TestAMemberThatJoinsIsFilledInTransfersOfManyKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 2, "hsm-x")
		r.mustStart()
		defer func() { r.stop() }()
		for i := range 3 * cloneKeys {
			r.create(fmt.Sprintf("key-%d", i))
		}
		r.add("hsm-x")
		if n, want := r.spare["hsm-x"].driver().Calls(memdriver.CallCloneStep), 2*(1+3); n != want { // a canary, and three transfers
			t.Errorf("%d steps, want %d", n, want)
		}
		r.wantVerified("key-0")
	})
}

// Whoever crashes in the middle of a transfer of many keys, at either end, no key is lost
// and none is left that should not be there.
func TestACrashInATransferOfManyKeys(t *testing.T) {
	atEveryStep(t, func(t *testing.T, step int) (more bool) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.hsms[2].leave()
		r.wantStates(active, active, down)
		for i := range cloneKeys + 2 {
			r.create(fmt.Sprintf("key-%d", i))
		}
		reached := r.interrupt(int64(step), func(h *hsm) { h.driver().Crash() })
		r.hsms[2].come()
		r.wantConsistent()
		r.wantVerified("key-0")
		return reached()
	})
}

// HSMs that keep their cloning domain to themselves prove at the start of a new group that
// they understand each other, not with the first key that somebody needs.
func TestANewGroupOfHSMsThatHideTheirDomainIsProven(t *testing.T) {
	for _, other := range []bool{false, true} {
		t.Run(fmt.Sprintf("another domain: %v", other), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 2)
				for _, h := range r.hsms {
					h.hidden = true
				}
				if other {
					r.hsms[1].faults = []memdriver.Fault{{
						Call: memdriver.CallCloneStep,
						Err:  &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: 0x80000108, Msg: "no cloning domain in common"},
					}}
				}
				r.mustStart()
				defer r.stop()
				<-time.After(time.Minute)
				failed := 0
				for i, m := range r.Status().Groups[0].Members {
					if m.State == api.MemberFailed && strings.Contains(m.Reason, "no cloning domain in common") {
						failed++
					}
					if n := len(r.hsms[i].token.Keys()); n > 0 {
						t.Errorf("%s is left with %d keys", m.Name, n)
					}
				}
				if other != (failed == 1) {
					t.Errorf("%d members have failed: %+v", failed, r.Status().Groups[0].Members)
				}
			})
		})
	}
}

// Where two HSMs find out that they have nothing in common is the protocol's business: it may
// be the one that gives.
func TestAMemberThatNobodyGivesKeysToDoesNotFit(t *testing.T) {
	warns := []pluginproto.Fact{{Name: "cloning", Value: "policy 4 is off", Warning: true}, {Name: "room", Value: "plenty"}}
	for _, c := range []struct {
		name    string
		refuses int // members that refuse to give keys to the new one
		failure pluginproto.Error
		says    string
		fits    bool
	}{
		{"all refuse", 2, pluginproto.Error{Class: pluginproto.ClassCaller, CKR: 0x80000108, Msg: "no domain in common"},
			"no domain in common (it refuses a clone of a canary key); its driver warns: cloning: policy 4 is off", false},
		{"one gives", 1, pluginproto.Error{Class: pluginproto.ClassCaller, Msg: "no domain in common"}, "", true},
		{"all are in trouble", 2, pluginproto.Error{Class: pluginproto.ClassBusy, Msg: "later"}, "no other member could make one", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newReserve(t, 2, "hsm-x")
				plain := r.enlist
				r.enlist = func(group string, spec api.MemberSpec) (kms.MemberConfig, error) {
					m, err := plain(group, spec)
					open := m.Open
					m.Open = func(ctx context.Context) (pluginproto.Driver, error) {
						d, err := open(ctx)
						return &disguised{d, func(i *pluginproto.TokenInfo) { i.Facts = warns }}, err
					}
					return m, err
				}
				r.mustStart()
				defer func() { r.stop() }()
				r.create("shop")
				for _, h := range r.hsms[:c.refuses] {
					h.driver().Script(memdriver.Fault{Call: memdriver.CallCloneStep, Err: &c.failure})
				}
				_, err := r.AddMember(t.Context(), "", r.spec("hsm-x", "hsm-x"))
				if c.fits {
					if err != nil {
						t.Fatal(err)
					}
					return
				}
				wantError(t, err, api.ErrMemberFailed, c.says)
				if e := api.AsError(err); strings.Contains(e.Message, "\n") || strings.Contains(e.Message, "plenty") {
					t.Errorf("the error is %q", e.Message)
				}
				r.wantMembers("hsm-a hsm-b")
			})
		})
	}
}
