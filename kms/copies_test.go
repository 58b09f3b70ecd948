package kms_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms"
	"kmsd/kms/api"
)

// With two of three members lost at any step, a key that needs two copies is made
// whole or not at all.
func TestTooFewCopiesAtAnyStepLeavesNothingBehind(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(*rig) error
		want int // versions of shop when it failed
	}{
		{"creating", func(r *rig) error {
			_, err := r.CreateMasterKey(r.t.Context(), "shop", kms.KeyOptions{})
			return err
		}, 0},
		{"rotating", func(r *rig) error {
			_, err := r.Rotate(r.t.Context(), "shop")
			return err
		}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			atEveryStep(t, func(t *testing.T, step int) (more bool) {
				r := newRig(t, 3).mustStart()
				defer r.stop()
				if c.want > 0 {
					r.create("shop")
				}
				reached := r.interrupt(int64(step), func(*hsm) {
					r.hsms[1].leave()
					r.hsms[2].leave()
				})
				err := c.make(r)
				more = reached()
				for _, h := range r.hsms {
					h.setStep(nil)
				}
				versions := 0
				if key, err := r.Key(t.Context(), "shop"); err == nil {
					versions = len(key.Versions)
				}
				switch {
				case err == nil && versions != c.want+1:
					t.Errorf("it was acknowledged, and there are %d versions", versions)
				case err != nil && versions != c.want:
					t.Errorf("it was refused, and there are %d versions", versions)
				case err != nil:
					wantError(t, err, kms.ErrInsufficientCopies, "key shop needs 2 copies, but only hsm-a could take one (hsm-b")
				}
				synctest.Wait() // a driver that was killed does nothing any more
				r.hsms[1].come()
				r.hsms[2].come()
				r.wantStates(active, active, active)
				r.wantConsistent()
				return more
			})
		})
	}
}

func TestARotationOnOneMemberIsRefusedUnlessItIsAllowed(t *testing.T) { // W28, W29
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		old := r.wrap("shop")
		r.hsms[1].leave()
		r.hsms[2].leave()
		r.wantStates(active, down, down)

		_, err := r.RotateWith(t.Context(), "shop", api.RotateOptions{})
		wantError(t, err, kms.ErrInsufficientCopies, "key shop needs 2 copies, but only hsm-a could take one")
		e, _ := errors.AsType[*api.Error](err)
		for _, text := range []string{"hsm-b is down: ", "hsm-c is down: "} {
			if !strings.Contains(e.Message, text) {
				t.Errorf("the error does not say why a member has none: %q is not in %q", text, e.Message)
			}
		}
		if !e.Retryable || !strings.Contains(e.Hint, "allow the key to be made degraded") {
			t.Errorf("what to do is not said: retryable %t, hint %q", e.Retryable, e.Hint)
		}

		v, err := r.RotateWith(t.Context(), "shop", api.RotateOptions{AllowDegraded: true})
		if err != nil || v.Number != 2 || fmt.Sprint(v.Copies) != "[hsm-a]" {
			t.Fatalf("allowed: version %d on %v, %v", v.Number, v.Copies, err)
		}
		r.wantUnwrap("shop", old)
		r.wantUnwrap("shop", r.wrap("shop"))

		r.hsms[1].come()
		r.hsms[2].come()
		r.wantStates(active, active, active)
		r.wantConsistent() // the others have it now
		r.wantVerified("shop")
	})
}

func TestStatusCountsVersionsWithTooFewCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer func() { r.stop() }()
		want := func(when string, below, without int) {
			t.Helper()
			if g := r.Status().Groups[0]; g.BelowMinCopies != below || g.WithoutCopy != without {
				t.Errorf("%s %d versions have too few copies and %d none, want %d and %d", when, g.BelowMinCopies, g.WithoutCopy, below, without)
			}
		}
		r.create("shop")
		want("with all members", 0, 0)
		r.hsms[1].leave()
		r.hsms[2].leave()
		r.wantStates(active, down, down)
		want("with copies on members that are away", 0, 0)
		if _, err := r.RotateWith(t.Context(), "shop", api.RotateOptions{AllowDegraded: true}); err != nil {
			t.Fatal(err)
		}
		want("with a version on one member", 1, 0)
		if err := r.RemoveMember(t.Context(), "", "hsm-a", true); err != nil {
			t.Fatal(err)
		}
		want("without its only holder", 1, 1)
		r.restart()
		want("after a restart", 1, 1)
		if _, err := r.Destroy(t.Context(), "shop", 0); err != nil {
			t.Fatal(err)
		}
		want("when it is destroyed", 0, 0)
	})
}

func TestARotationByScheduleNeverDegrades(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		if _, err := r.CreateMasterKey(t.Context(), "shop", kms.KeyOptions{RotationPeriod: kms.Duration(time.Hour), AllowDegraded: true}); err != nil {
			t.Fatal(err)
		}
		r.hsms[1].leave()
		r.hsms[2].leave()
		<-time.After(90 * time.Minute)
		if key, err := r.Key(t.Context(), "shop"); err != nil || key.Primary != 1 {
			t.Errorf("with one member there is version %d, %v", key.Primary, err)
		}
		r.hsms[1].come()
		r.wantStates(active, active, down)
		r.eventually(func() error {
			key, err := r.Key(t.Context(), "shop")
			if err == nil && (key.Primary != 2 || len(key.Versions[1].Copies) != 2) {
				err = fmt.Errorf("with two members: %+v", key.Versions)
			}
			return err
		})
		r.hsms[2].come()
		r.wantConsistent()
	})
}
