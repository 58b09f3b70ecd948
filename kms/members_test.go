package kms_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

const (
	active  = api.MemberActive
	standby = api.MemberStandby
	down    = api.MemberDown
	failed  = api.MemberFailed
)

func TestMemberAwayIsBroughtInStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("old")
		r.create("doomed")
		r.hsms[2].leave()
		r.wantStates(active, active, down)

		key := r.create("new")
		if got := fmt.Sprint(key.Versions[0].Copies); got != "[hsm-a hsm-b]" {
			t.Fatalf("copies of a key made while hsm-c is away: %s", got)
		}
		if _, err := r.Rotate(t.Context(), "old"); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Destroy(t.Context(), "doomed", 0); err != nil {
			t.Fatal(err)
		}
		wrapped := r.wrap("new")
		if m := r.Status().Groups[0].Members[2]; m.Keys != 1 || m.Missing != 2 {
			t.Errorf("hsm-c holds %d and misses %d, want 1 and 2", m.Keys, m.Missing)
		}

		r.hsms[2].come()
		r.wantStates(active, active, active)
		if err := r.consistent(); err != nil {
			t.Errorf("hsm-c serves, but: %v", err)
		}
		r.wantUnwrapOn(r.hsms[2], "new", wrapped)
		r.wantVerified("old")
	})
}

func TestMemberAwayAcrossARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer func() { r.stop() }()
		r.create("doomed")
		r.hsms[2].leave()
		r.wantStates(active, active, down)
		r.create("new")
		if _, err := r.Destroy(t.Context(), "doomed", 0); err != nil {
			t.Fatal(err)
		}
		r.restart()
		r.hsms[2].come()
		r.wantStates(active, active, active)
		r.wantConsistent()
	})
}

func TestMembersThatEachLackSomethingSupplyEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer func() { r.stop() }()
		wrapped := make(map[string][]byte)
		for _, name := range []string{"red", "green", "blue"} {
			r.create(name)
			wrapped[name] = r.wrap(name)
		}
		r.stop()
		for i, id := range r.hsms[0].token.Keys() {
			r.hsms[i].token.Lose(id)
		}
		r.mustStart()
		r.wantStates(active, active, active)
		r.wantConsistent()
		for name, w := range wrapped {
			r.wantUnwrap(name, w)
			r.wantVerified(name)
		}
	})
}

func TestKeyThatNobodyHasKeepsNobodyOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer func() { r.stop() }()
		r.create("good")
		good := r.wrap("good")
		r.hsms[2].leave()
		r.wantStates(active, active, down)
		r.create("gone")
		gone := r.wrap("gone")
		// Both holders leave; only the member that never had the key is left.
		r.hsms[0].leave()
		r.hsms[1].leave()
		r.hsms[2].come()
		r.wantStates(down, down, active)
		r.wantUnwrap("good", good)
		_, err := r.Unwrap(t.Context(), "gone", gone, []byte("aad"))
		wantError(t, err, kms.ErrUnavailable, "member hsm-c")
		if m := r.Status().Groups[0].Members[2]; m.Keys != 1 || m.Missing != 1 {
			t.Errorf("hsm-c holds %d and misses %d, want 1 and 1", m.Keys, m.Missing)
		}
		r.hsms[0].come()
		r.wantStates(active, down, active)
		r.eventually(func() error { // hsm-c gets it from hsm-a
			if m := r.Status().Groups[0].Members[2]; m.Missing != 0 {
				return fmt.Errorf("hsm-c misses %d", m.Missing)
			}
			return nil
		})
		r.hsms[1].come()
		r.wantStates(active, active, active)
		r.wantUnwrapOn(r.hsms[2], "gone", gone)
	})
}

func TestLostKeyIsNeverAbsent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		wrapped := r.wrap("shop")
		id := r.hsms[0].token.Keys()[0]
		r.hsms[0].token.Lose(id)
		r.hsms[1].token.Lose(id)
		for range 10 {
			r.wantUnwrap("shop", wrapped)
		}
		r.wantConsistent() // it is brought back by itself
		r.wantVerified("shop")

		for _, h := range r.hsms {
			h.token.Lose(id)
		}
		_, err := r.Unwrap(t.Context(), "shop", wrapped, []byte("aad"))
		wantError(t, err, kms.ErrUnavailable, "unwrapping with key")
		if _, err := r.Key(t.Context(), "shop"); err != nil {
			t.Errorf("the key itself: %v", err)
		}
		_, err = r.CreateMasterKey(t.Context(), "shop", kms.KeyOptions{})
		wantError(t, err, kms.ErrExists, `there is a key "shop" already`)
	})
}

func TestVerifyTellsMissingFromUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 4).mustStart()
		defer r.stop()
		r.create("shop")
		id := r.hsms[0].token.Keys()[0]
		r.hsms[1].token.Lose(id)
		r.hsms[2].token.Corrupt(id)
		r.hsms[3].leave()
		r.wantStates(active, active, active, down)
		v, err := r.Verify(t.Context(), "shop")
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, c := range v.Copies {
			got = append(got, c.Member+" "+c.State)
		}
		want := "hsm-a ok, hsm-b missing, hsm-c different, hsm-d unknown"
		if v.OK || strings.Join(got, ", ") != want {
			t.Errorf("OK %v, copies %v, want %s", v.OK, got, want)
		}
		if v.Copies[3].Error == "" {
			t.Error("nothing says why hsm-d is unknown")
		}
	})
}

func TestForeignKeysAreLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		stranger := memdriver.New(memdriver.Options{Token: r.hsms[0].token})
		if _, err := stranger.Open(t.Context(), pluginproto.OpenRequest{PIN: []byte(memdriver.PIN), Domain: make([]byte, 32)}); err != nil {
			t.Fatal(err)
		}
		spec := pluginproto.KeySpec{ID: pluginproto.KeyID{1}, Type: pluginproto.AES256}
		if _, err := stranger.Generate(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		r.mustStart()
		defer r.stop()
		r.create("shop")
		if n := len(r.hsms[0].token.Keys()); n != 2 {
			t.Errorf("hsm-a holds %d keys, want the foreign one and ours", n)
		}
		if !strings.Contains(r.log.String(), "foreign=1") {
			t.Error("the log does not mention the foreign key")
		}
	})
}

func TestWrongPINIsTriedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const right, wrong = "open sesame", "close sesame" // no time of day has that in it
		r := newRig(t, 2)
		for _, h := range r.hsms {
			h.token.SetPIN(right)
			h.pin = right
		}
		r.hsms[1].pin = wrong
		r.group.MinCopies = 1
		r.mustStart()
		defer r.stop()
		r.wantStates(active, failed)
		m := r.Status().Groups[0].Members[1]
		if m.CKR != "CKR_PIN_INCORRECT" {
			t.Errorf("CKR is %s", m.CKR)
		}
		<-time.After(30 * time.Minute)
		if err := r.Recover(t.Context(), "", "hsm-b"); !errors.Is(err, kms.ErrMemberFailed) {
			t.Errorf("Recover = %v, want ErrMemberFailed", err)
		}
		if n := r.hsms[1].token.PINTries(); n != 1 {
			t.Errorf("the wrong PIN was tried %d times", n)
		}
		r.hsms[1].mu.Lock()
		r.hsms[1].pin = right
		r.hsms[1].mu.Unlock()
		r.wantStates(active, active)
		if log := r.log.String(); strings.Contains(log, right) || strings.Contains(log, wrong) {
			t.Errorf("a PIN is in the log:\n%s", log)
		}
	})
}

func TestSecretsThatCannotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		r.group.Domain = func(context.Context) ([]byte, error) { return nil, errors.New("domain: no such file") }
		if err := r.start(nil); err != nil {
			t.Fatalf("Open = %v, want a group without members", err)
		}
		defer r.stop()
		reason := r.Status().Groups[0].Members[0].Reason
		if !strings.Contains(reason, "the domain secret: domain: no such file") {
			t.Errorf("reason is %q", reason)
		}
		_, err := r.CreateMasterKey(t.Context(), "shop", kms.KeyOptions{})
		wantError(t, err, kms.ErrGroupLost, "no member of the group can serve")
	})
}

func TestStandbyHoldsEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3)
		r.group.Members[2].Standby = true
		r.mustStart()
		defer r.stop()
		r.wantStates(active, active, standby)
		r.create("shop")
		wrapped := r.wrap("shop")
		r.wantVerified("shop")
		r.hsms[0].leave()
		r.hsms[1].leave()
		r.wantUnwrap("shop", wrapped)
		if s := r.Status().Groups[0].State; s != api.GroupStandbyServing {
			t.Errorf("the group is %s", s)
		}
	})
}

func TestReadinessFollowsTheMembers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		<-time.After(10 * time.Second) // probes alone
		if ready := r.Ready(); !ready.Ready || !ready.Members[0].OK || !ready.Members[1].OK {
			t.Fatalf("idle group: %+v", ready)
		}
		r.hsms[1].leave()
		r.wantStates(active, down)
		if ready := r.Ready(); !ready.Ready || ready.Members[1].OK {
			t.Errorf("without hsm-b: %+v", ready)
		}
		r.hsms[0].leave()
		r.wantStates(down, down)
		if ready := r.Ready(); ready.Ready {
			t.Errorf("without any member: %+v", ready)
		}
		r.hsms[0].come()
		r.wantStates(active, down)
		if ready := r.Ready(); !ready.Ready {
			t.Errorf("with hsm-a back: %+v", ready)
		}
	})
}
