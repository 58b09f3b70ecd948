package kms_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// sync asks for a synchronization that must succeed, and returns it by member.
func (r *rig) sync(opts api.SyncOptions) (api.SyncReport, map[string]api.MemberSync) {
	r.t.Helper()
	report, err := r.Sync(r.t.Context(), "", opts)
	if err != nil {
		r.t.Fatal(err)
	}
	by := make(map[string]api.MemberSync)
	for _, m := range report.Members {
		by[m.Member] = m
	}
	return report, by
}

// behind returns a driver of the test's own on a member's token, as another program
// has that uses the same token.
func (h *hsm) behind(t *testing.T) *memdriver.Driver {
	t.Helper()
	d := memdriver.New(memdriver.Options{Token: h.token})
	req := pluginproto.OpenRequest{PIN: []byte(memdriver.PIN), Domain: make([]byte, 32)}
	if _, err := d.Open(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestSyncTellsWhatItFoundAndMended(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 4).mustStart()
		defer r.stop()
		r.create("shop")
		r.create("till")
		ids := r.hsms[1].token.Keys()
		r.hsms[1].token.Lose(ids[0])
		label := "somebody was here"
		if err := r.hsms[1].behind(t).SetAttributes(t.Context(), ids[1], pluginproto.Attributes{Label: &label}); err != nil {
			t.Fatal(err)
		}
		r.hsms[2].token.Corrupt(ids[0])
		r.hsms[3].leave()
		r.wantStates(active, active, active, down)
		report, by := r.sync(api.SyncOptions{})
		if report.Group != "default" || len(report.Members) != 4 || report.Adopted != nil {
			t.Errorf("report %+v", report)
		}
		if m := by["hsm-a"]; m.Held != 2 || m.Cloned+m.Changed+m.Destroyed+m.Missing != 0 || m.Error != "" {
			t.Errorf("nothing was wrong with hsm-a: %+v", m)
		}
		if m := by["hsm-b"]; m.Held != 2 || m.Cloned != 1 || m.Changed != 1 || m.Error != "" {
			t.Errorf("hsm-b lacked a key and had another label: %+v", m)
		}
		if m := by["hsm-c"]; m.Held != 1 || len(m.Quarantined) != 1 || !strings.HasSuffix(m.Quarantined[0], " version 1") {
			t.Errorf("hsm-c held another key: %+v", m)
		}
		if m := by["hsm-d"]; !strings.HasPrefix(m.Error, "it is down, and compared when it comes back: ") {
			t.Errorf("hsm-d was away: %+v", m)
		}
		r.hsms[2].token.Lose(ids[0])
		if _, by = r.sync(api.SyncOptions{}); by["hsm-c"].Cloned != 1 || by["hsm-c"].Quarantined != nil {
			t.Errorf("the wrong object was removed: %+v", by["hsm-c"])
		}
		r.hsms[3].come()
		r.wantConsistent()
	})
}

func TestSyncNeverTakesAMemberOutOfService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		r.create("shop")
		wrapped := r.wrap("shop")
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan int)
		go func() {
			n := 0
			for ; ctx.Err() == nil; n++ {
				if _, err := r.Unwrap(t.Context(), "shop", wrapped, []byte("aad")); err != nil {
					t.Errorf("unwrapping: %v", err)
				}
				<-time.After(time.Millisecond)
			}
			served <- n
		}()
		for range 20 {
			r.sync(api.SyncOptions{})
			<-time.After(10 * time.Millisecond)
			r.wantStates(active, active)
		}
		cancel()
		if n := <-served; n < 100 {
			t.Errorf("%d were served", n)
		}
	})
}

func TestSyncOfAGroupThatCannot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		_, err := r.Sync(t.Context(), "other", api.SyncOptions{})
		wantError(t, err, kms.ErrNotFound, `there is no group "other"`)

		r.hsms[0].driver().Script(memdriver.Fault{Call: memdriver.CallList, Hang: make(chan struct{})})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		_, err = r.Sync(ctx, "", api.SyncOptions{})
		wantError(t, err, kms.ErrDeadline, "synchronizing group default")
		if took := time.Since(began); took > 1050*time.Millisecond {
			t.Errorf("the answer took %v", took)
		}

		for _, h := range r.hsms {
			h.leave()
		}
		r.wantStates(down, down)
		if _, by := r.sync(api.SyncOptions{}); by["hsm-a"].Error == "" || by["hsm-b"].Error == "" {
			t.Errorf("nobody could be asked: %+v", by)
		}
	})
}

func TestReinitializeBringsBackWhoWasGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		r.group.Recovery = kms.RecoveryConfig{Manual: true}
		r.mustStart()
		defer r.stop()
		r.create("shop")
		wrapped := r.wrap("shop")
		for _, h := range r.hsms {
			h.leave()
		}
		r.wantStates(down, down)
		g, err := r.Reinitialize(t.Context(), "")
		if err != nil || g.State != api.GroupLost {
			t.Fatalf("with nobody there: %s, %v", g.State, err)
		}
		_, err = r.Unwrap(t.Context(), "shop", wrapped, []byte("aad"))
		wantError(t, err, kms.ErrGroupLost, "")
		for _, h := range r.hsms {
			h.come()
		}
		<-time.After(time.Minute)
		r.wantStates(down, down) // by itself nobody comes
		if g, err = r.Reinitialize(t.Context(), ""); err != nil || g.State != api.GroupNormal {
			t.Errorf("with everybody there: %s, %v", g.State, err)
		}
		r.wantUnwrap("shop", wrapped) // what was made before is as good as ever
		_, err = r.Reinitialize(t.Context(), "other")
		if !errors.Is(err, kms.ErrNotFound) {
			t.Errorf("another group: %v", err)
		}
	})
}
