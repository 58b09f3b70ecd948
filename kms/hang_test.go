package kms_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
)

// A token that hangs while it makes one key, and answers everything else, must not
// keep other keys waiting.
func TestOtherKeysAreManagedWhileATokenHangsInAGeneration(t *testing.T) { // W22
	for _, c := range []struct {
		name    string
		typ     string
		timeout time.Duration // of the one whose key hangs
	}{
		{"of a pair, and its caller waits", "rsa-2048", 10 * time.Minute},
		{"of a pair, and its caller has left", "rsa-2048", time.Second},
		{"of a secret key, and its caller waits", "aes-256", 10 * time.Minute},
		{"of a secret key, and its caller has left", "aes-256", time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, 3).mustStart()
				defer r.stop()
				r.create("old")
				thaw := make(chan struct{})
				r.hsms[0].driver().Script(memdriver.Fault{Call: memdriver.CallGenerate, Times: 1, Hang: thaw})
				ctx, cancel := context.WithTimeout(t.Context(), c.timeout)
				defer cancel()
				ended := make(chan error, 1)
				go func() {
					_, err := r.CreateMasterKey(ctx, "stuck", kms.KeyOptions{Type: c.typ})
					ended <- err
				}()
				<-time.After(2 * time.Second)

				for _, step := range []struct {
					name string
					do   func() error
				}{
					{"creating", func() error { _, err := r.CreateMasterKey(t.Context(), "new", kms.KeyOptions{}); return err }},
					{"rotating", func() error { _, err := r.Rotate(t.Context(), "old"); return err }},
					{"destroying", func() error { _, err := r.Destroy(t.Context(), "old", 0); return err }},
				} {
					began := time.Now()
					if err := step.do(); err != nil {
						t.Errorf("%s: %v", step.name, err)
					}
					if took := time.Since(began); took > 10*time.Second {
						t.Errorf("%s took %v", step.name, took)
					}
				}
				r.wantUnwrap("new", r.wrap("new"))

				if err := <-ended; err != nil && !errors.Is(err, kms.ErrDeadline) {
					t.Errorf("the key that hung: %v", err)
				}
				close(thaw)
				r.wantStates(active, active, active)
				r.wantConsistent()
			})
		})
	}
}

// More pairs than members: each waits for its turn, and none is refused.
func TestPairsAreMadeSideBySideAndWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2).mustStart()
		defer r.stop()
		for _, h := range r.hsms {
			h.driver().Script(memdriver.Fault{Call: memdriver.CallGenerate, Delay: 7 * time.Second})
		}
		began := time.Now()
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
				defer cancel()
				if _, err := r.CreateMasterKey(ctx, fmt.Sprintf("key-%d", i), kms.KeyOptions{Type: "ec-p256"}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		t.Logf("4 pairs of 7 s on 2 members took %v", time.Since(began))
		r.wantConsistent()
	})
}
