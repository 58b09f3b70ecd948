package kms_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/kms"
	"kmsd/kms/api"
)

func TestKeyLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		key := r.create("shop")
		if key.Type != "aes-256" || key.Primary != 1 || key.State != kms.StateEnabled || key.MinCopies != 2 ||
			!slices.Equal(key.Versions[0].Copies, []string{"hsm-a", "hsm-b", "hsm-c"}) {
			t.Fatalf("created %+v", key)
		}
		first := r.wrap("shop")
		r.wantUnwrap("shop", first)

		if n, err := r.Rotate(t.Context(), "shop"); err != nil || n != 2 {
			t.Fatalf("Rotate = %d, %v, want 2", n, err)
		}
		second := r.wrap("shop")
		r.wantUnwrap("shop", first)
		r.wantUnwrap("shop", second)
		r.wantVerified("shop")

		moved, err := r.Rewrap(t.Context(), "shop", first, []byte("aad"))
		if err != nil {
			t.Fatal(err)
		}
		r.wantUnwrap("shop", moved)
		results, err := r.Batch(t.Context(), kms.OpUnwrap, "shop", []kms.Item{
			{Wrapped: first, AAD: []byte("aad")}, {Wrapped: moved, AAD: []byte("aad")}})
		if err != nil || results[0].Version != 1 || results[1].Version != 2 {
			t.Fatalf("versions of the envelopes: %+v, %v, want 1 and 2", results, err)
		}

		if _, err := r.Disable(t.Context(), "shop"); err != nil {
			t.Fatal(err)
		}
		_, err = r.Unwrap(t.Context(), "shop", first, []byte("aad"))
		wantError(t, err, kms.ErrState, "version 1 of key shop is disabled")
		_, err = r.Wrap(t.Context(), "shop", []byte("x"), nil)
		wantError(t, err, kms.ErrState, "key shop is disabled")
		_, err = r.Rotate(t.Context(), "shop")
		wantError(t, err, kms.ErrState, "key shop is disabled")

		if key, err = r.Destroy(t.Context(), "shop", time.Hour); err != nil || key.State != kms.StateDestroyScheduled || key.DestroyAt == nil {
			t.Fatalf("Destroy = %+v, %v", key, err)
		}
		_, err = r.Enable(t.Context(), "shop")
		wantError(t, err, kms.ErrState, "key shop is scheduled for destruction")
		if key, err = r.Restore(t.Context(), "shop"); err != nil || key.State != kms.StateDisabled || key.DestroyAt != nil {
			t.Fatalf("Restore = %+v, %v, want it disabled as before", key, err)
		}
		_, err = r.Restore(t.Context(), "shop")
		wantError(t, err, kms.ErrState, "key shop is disabled, not scheduled for destruction")
		if _, err = r.Enable(t.Context(), "shop"); err != nil {
			t.Fatal(err)
		}
		r.wantUnwrap("shop", first)

		if key, err = r.Destroy(t.Context(), "shop", 0); err != nil || key.State != kms.StateDestroyed || key.Primary != 0 {
			t.Fatalf("Destroy = %+v, %v", key, err)
		}
		_, err = r.Unwrap(t.Context(), "shop", first, []byte("aad"))
		wantError(t, err, kms.ErrState, "version 1 of key shop is destroyed")
		_, err = r.CreateMasterKey(t.Context(), "shop", kms.KeyOptions{})
		wantError(t, err, kms.ErrExists, "names are not used again")
		_, err = r.Destroy(t.Context(), "shop", 0)
		wantError(t, err, kms.ErrState, "destroyed already")
		r.wantConsistent()
	})
}

func TestScheduledDestructionHappensInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		r.create("shop")
		wrapped := r.wrap("shop")
		key, err := r.Destroy(t.Context(), "shop", -1)
		if err != nil || time.Until(*key.DestroyAt).Round(time.Second) != 720*time.Hour {
			t.Fatalf("Destroy without a window: %v, %v, want 720 h from now", key.DestroyAt, err)
		}
		if _, err := r.Destroy(t.Context(), "shop", 10*time.Minute); err != nil {
			t.Fatal(err)
		}
		<-time.After(9 * time.Minute)
		if key, _ := r.Key(t.Context(), "shop"); key.State != kms.StateDestroyScheduled {
			t.Fatalf("after 9 minutes the key is %s", key.State)
		}
		<-time.After(time.Minute)
		r.eventually(func() error {
			_, err := r.Unwrap(t.Context(), "shop", wrapped, []byte("aad"))
			if e := api.AsError(err); e.Code != api.CodeState || e.Message != "version 1 of key shop is destroyed" {
				return err
			}
			return nil
		})
		r.wantConsistent()
	})
}

func TestRotationPeriodMakesVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 3).mustStart()
		defer r.stop()
		if _, err := r.CreateMasterKey(t.Context(), "shop", kms.KeyOptions{RotationPeriod: kms.Duration(4 * time.Minute)}); err != nil {
			t.Fatal(err)
		}
		<-time.After(13 * time.Minute)
		key, err := r.Key(t.Context(), "shop")
		if err != nil || key.Primary != 4 {
			t.Fatalf("after 13 minutes the primary version is %d, %v, want 4", key.Primary, err)
		}
		never := kms.Duration(0)
		if _, err := r.UpdateKey(t.Context(), "shop", kms.KeyUpdate{RotationPeriod: &never}); err != nil {
			t.Fatal(err)
		}
		<-time.After(12 * time.Minute)
		if key, _ := r.Key(t.Context(), "shop"); key.Primary != 4 {
			t.Errorf("with rotation off the primary version is %d, want 4", key.Primary)
		}
		r.wantVerified("shop")
	})
}
