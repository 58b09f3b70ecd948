package kms_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
)

// Whatever a member hangs in, a call of any kind ends with its deadline, and the
// next ones are not kept from their work for long.
func TestNoCallOutlivesItsDeadlineWhateverHangs(t *testing.T) {
	const slack = 50 * time.Millisecond
	calls := []struct {
		name string
		do   func(ctx context.Context, r *rig) error
	}{
		{"creating", func(ctx context.Context, r *rig) error {
			_, err := r.CreateMasterKey(ctx, "new", kms.KeyOptions{})
			return err
		}},
		{"creating a pair", func(ctx context.Context, r *rig) error {
			_, err := r.CreateMasterKey(ctx, "pair", kms.KeyOptions{Type: "ec-p256"})
			return err
		}},
		{"rotating", func(ctx context.Context, r *rig) error { _, err := r.Rotate(ctx, "old"); return err }},
		{"destroying", func(ctx context.Context, r *rig) error { _, err := r.Destroy(ctx, "doomed", 0); return err }},
		{"verifying", func(ctx context.Context, r *rig) error { _, err := r.Verify(ctx, "old"); return err }},
		{"wrapping", func(ctx context.Context, r *rig) error { _, err := r.Wrap(ctx, "old", []byte("x"), nil); return err }},
		{"synchronizing", func(ctx context.Context, r *rig) error {
			_, err := r.Sync(ctx, "default", api.SyncOptions{})
			return err
		}},
		{"adopting", func(ctx context.Context, r *rig) error {
			_, err := r.Sync(ctx, "default", api.SyncOptions{Adopt: true})
			return err
		}},
		{"checking", func(ctx context.Context, r *rig) error { _, err := r.Check(ctx, "default"); return err }},
		{"recovering", func(ctx context.Context, r *rig) error { return r.Recover(ctx, "default", "hsm-a") }},
		{"draining", func(ctx context.Context, r *rig) error { _, err := r.Drain(ctx, "default", "hsm-a", false); return err }},
		{"resuming", func(ctx context.Context, r *rig) error {
			_, err := r.SetRole(ctx, "default", "hsm-a", api.RoleActive, false)
			return err
		}},
		{"replacing", func(ctx context.Context, r *rig) error {
			_, err := r.ReplaceMember(ctx, "default", "hsm-b", nil)
			return err
		}},
		{"reinitializing", func(ctx context.Context, r *rig) error { _, err := r.Reinitialize(ctx, "default"); return err }},
		{"removing", func(ctx context.Context, r *rig) error {
			return r.RemoveMember(ctx, "default", "hsm-a", true)
		}},
	}
	for _, hung := range []memdriver.Call{
		"", memdriver.CallGenerate, memdriver.CallDestroy, memdriver.CallCloneStep, memdriver.CallList, memdriver.CallInspect, memdriver.CallDo,
	} {
		for _, members := range [][]int{{0}, {1, 2}, {0, 1, 2}} {
			for _, limit := range []time.Duration{100 * time.Millisecond, 1500 * time.Millisecond, 5 * time.Second} {
				t.Run(fmt.Sprintf("%q on %v, limit %v", hung, members, limit), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						r := newRig(t, 3).mustStart()
						r.create("old")
						r.create("doomed")
						thaw := make(chan struct{})
						for _, i := range members {
							r.hsms[i].driver().Script(memdriver.Fault{Call: hung, Hang: thaw})
						}
						for _, call := range calls {
							ctx, cancel := context.WithTimeout(t.Context(), limit)
							began := time.Now()
							err := call.do(ctx, r)
							if took := time.Since(began); took > limit+slack {
								t.Errorf("%s took %v: %v", call.name, took, err)
							}
							cancel()
						}
						close(thaw)
						for _, h := range r.hsms {
							h.driver().Clear()
						}
						<-time.After(5 * time.Minute)
						for _, call := range []string{"after-1", "after-2"} {
							began := time.Now()
							r.create(call)
							if took := time.Since(began); took > time.Second {
								t.Errorf("creating a key took %v when all was well again", took)
							}
						}
						r.stop()
					})
				})
			}
		}
	}
}
