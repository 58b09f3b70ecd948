package apitest

import (
	"errors"
	"testing"
	"time"

	"kmsd/kms/api"
)

func updated(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	period := api.Duration(48 * time.Hour)
	k, err := s.UpdateKey(t.Context(), "shop", api.KeyUpdate{RotationPeriod: &period})
	ok(t, err, "changing the rotation period")
	if k.RotationPeriod != period {
		t.Errorf("the answer has %+v", k)
	}
	shown, err := s.Key(t.Context(), "shop")
	ok(t, err, "showing the key")
	if shown.RotationPeriod != period || shown.MinCopies != k.MinCopies {
		t.Errorf("the key has %+v", shown)
	}
}

func rotated(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	first, err := s.Wrap(t.Context(), "shop", []byte("first"), nil)
	ok(t, err, "wrapping with version 1")
	version, err := s.Rotate(t.Context(), "shop")
	ok(t, err, "rotating")
	if version != 2 {
		t.Fatalf("the new version is %d, want 2", version)
	}
	k, err := s.Key(t.Context(), "shop")
	ok(t, err, "showing the key")
	if k.Primary != 2 || len(k.Versions) != 2 || k.Versions[0].CheckValue == k.Versions[1].CheckValue {
		t.Errorf("after rotation: %+v", k)
	}
	results, err := s.Batch(t.Context(), api.OpUnwrap, "shop", []api.Item{{Wrapped: first}})
	ok(t, err, "unwrapping with version 1")
	if results[0].Error != nil || string(results[0].Plaintext) != "first" || results[0].Version != 1 {
		t.Errorf("unwrapped %+v", results[0])
	}
	moved, err := s.Rewrap(t.Context(), "shop", first, nil)
	ok(t, err, "rewrapping")
	results, err = s.Batch(t.Context(), api.OpUnwrap, "shop", []api.Item{{Wrapped: moved}})
	ok(t, err, "unwrapping what was rewrapped")
	if results[0].Error != nil || string(results[0].Plaintext) != "first" || results[0].Version != 2 {
		t.Errorf("unwrapped after rewrapping: %+v", results[0])
	}
}

func disabled(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	wrapped, err := s.Wrap(t.Context(), "shop", []byte("p"), nil)
	ok(t, err, "wrapping")
	k, err := s.Disable(t.Context(), "shop")
	ok(t, err, "disabling")
	if k.State != api.StateDisabled {
		t.Errorf("disabled: %+v", k)
	}
	_, err = s.Wrap(t.Context(), "shop", []byte("p"), nil)
	wants(t, err, api.ErrState, "wrapping with a disabled key")
	_, err = s.Unwrap(t.Context(), "shop", wrapped, nil)
	wants(t, err, api.ErrState, "unwrapping with a disabled key")
	_, err = s.DataKey(t.Context(), "shop", 32, nil)
	wants(t, err, api.ErrState, "making a data key with a disabled key")
	k, err = s.Enable(t.Context(), "shop")
	ok(t, err, "enabling")
	if k.State != api.StateEnabled {
		t.Errorf("enabled: %+v", k)
	}
	p, err := s.Unwrap(t.Context(), "shop", wrapped, nil)
	if err != nil || string(p) != "p" {
		t.Errorf("unwrapping with an enabled key: %q, %v", p, err)
	}
}

func restored(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	wrapped, err := s.Wrap(t.Context(), "shop", []byte("p"), nil)
	ok(t, err, "wrapping")
	before := time.Now()
	k, err := s.Destroy(t.Context(), "shop", -1)
	ok(t, err, "scheduling the destruction")
	if k.State != api.StateDestroyScheduled || k.DestroyAt == nil {
		t.Fatalf("scheduled: %+v", k)
	}
	if window := k.DestroyAt.Sub(before); window < 719*time.Hour || window > 721*time.Hour {
		t.Errorf("the window is %v, want 720h", window)
	}
	_, err = s.Unwrap(t.Context(), "shop", wrapped, nil)
	wants(t, err, api.ErrState, "unwrapping with a key that is to be destroyed")
	k, err = s.Restore(t.Context(), "shop")
	ok(t, err, "restoring")
	if k.State != api.StateEnabled || k.DestroyAt != nil {
		t.Errorf("restored: %+v", k)
	}
	p, err := s.Unwrap(t.Context(), "shop", wrapped, nil)
	if err != nil || string(p) != "p" {
		t.Errorf("unwrapping with a restored key: %q, %v", p, err)
	}
}

func destroyed(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	wrapped, err := s.Wrap(t.Context(), "shop", []byte("p"), nil)
	ok(t, err, "wrapping")
	k, err := s.Destroy(t.Context(), "shop", 0)
	ok(t, err, "destroying")
	if k.State != api.StateDestroyed || k.Primary != 0 {
		t.Errorf("destroyed: %+v", k)
	}
	_, err = s.Unwrap(t.Context(), "shop", wrapped, nil)
	wants(t, err, api.ErrState, "unwrapping with a destroyed key")
	_, err = s.Restore(t.Context(), "shop")
	wants(t, err, api.ErrState, "restoring a destroyed key")
	_, err = s.Enable(t.Context(), "shop")
	wants(t, err, api.ErrState, "enabling a destroyed key")
}

func verified(t *testing.T, s api.Service) {
	make1(t, s, "shop", "")
	_, err := s.Rotate(t.Context(), "shop")
	ok(t, err, "rotating")
	v, err := s.Verify(t.Context(), "shop")
	ok(t, err, "verifying")
	seen := make(map[int]bool)
	for _, c := range v.Copies {
		seen[c.Version] = true
		if c.State != "ok" || c.Member == "" || c.CheckValue == "" {
			t.Errorf("copy %+v", c)
		}
	}
	if !v.OK || v.Name != "shop" || !seen[1] || !seen[2] {
		t.Errorf("verification %+v", v)
	}
}

func wrongTypes(t *testing.T, s api.Service) {
	make1(t, s, "aes", "aes-256")
	make1(t, s, "ec", "ec-p256")
	make1(t, s, "hmac", "hmac-sha256")
	can := map[string]map[string]bool{
		"aes":  {"Wrap": true, "Unwrap": true, "Rewrap": true, "DataKey": true, "Batch": true},
		"ec":   {"Sign": true, "VerifySignature": true},
		"hmac": {"MAC": true},
	}
	for name, methods := range can {
		for method, err := range uses(t.Context(), s, name) {
			if methods[method] == errors.Is(err, api.ErrBadRequest) {
				t.Errorf("%s with key %s: %v", method, name, err)
			}
		}
	}
}
