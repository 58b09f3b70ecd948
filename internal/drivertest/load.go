package drivertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"kmsd/pluginproto"
)

// testConcurrency has 32 callers do everything at once and each check its answers.
func (s *suite) testConcurrency(t *testing.T) {
	const callers, rounds = 32, 8
	shared := generate(t, s.a, pluginproto.AES256).ID
	errs := make(chan error, callers)
	var wg sync.WaitGroup
	for n := range callers {
		wg.Go(func() {
			for round := range rounds {
				if err := s.mixed(limit(t), shared, n, round); err != nil {
					errs <- fmt.Errorf("caller %d: %w", n, err)
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
}

// mixed is one round of one caller.
func (s *suite) mixed(ctx context.Context, shared pluginproto.KeyID, caller, round int) error {
	text := fmt.Appendf(nil, "caller %d round %d", caller, round)
	if err := roundTrip(ctx, s.a, shared, text); err != nil {
		return err
	}
	switch (caller + round) % 8 {
	case 0:
		spec := pluginproto.KeySpec{ID: newID(), Type: pluginproto.AES256}
		if _, err := s.a.Generate(ctx, spec); err != nil {
			return err
		}
		if err := roundTrip(ctx, s.a, spec.ID, text); err != nil {
			return err
		}
		return s.a.Destroy(ctx, spec.ID)
	case 1:
		_, err := s.a.List(ctx)
		return err
	case 2:
		_, err := s.a.Inspect(ctx, shared)
		return err
	case 3:
		_, err := s.a.Do(ctx, pluginproto.Command{Op: pluginproto.OpProbe})
		return err
	default:
		_, err := s.a.Do(ctx, pluginproto.Command{Op: pluginproto.OpRandom, Length: 32})
		return err
	}
}

func roundTrip(ctx context.Context, d pluginproto.Driver, id pluginproto.KeyID, text []byte) error {
	cmd := encryptCommand(id, text, nil)
	sealed, err := d.Do(ctx, cmd)
	if err != nil {
		return err
	}
	opened, err := d.Do(ctx, decryptOf(cmd, sealed))
	if err != nil {
		return err
	}
	if !bytes.Equal(opened.Output, text) {
		return fmt.Errorf("%q came back, want %q", opened.Output, text)
	}
	return nil
}

// testContext says that no call outlives its context.
func (s *suite) testContext(t *testing.T) {
	id := generate(t, s.a, pluginproto.AES256).ID
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	expired, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	for name, ctx := range map[string]context.Context{"cancelled": cancelled, "expired": expired} {
		for call, fn := range map[string]func() error{
			"do":       func() error { _, err := s.a.Do(ctx, encryptCommand(id, nil, nil)); return err },
			"inspect":  func() error { _, err := s.a.Inspect(ctx, id); return err },
			"list":     func() error { _, err := s.a.List(ctx); return err },
			"generate": func() error { return s.generateWith(ctx) },
			"destroy":  func() error { return s.a.Destroy(ctx, id) },
		} {
			t.Run(name+" before "+call, func(t *testing.T) {
				if err := fn(); !errors.Is(err, ctx.Err()) {
					t.Errorf("error %v, want %v", err, ctx.Err())
				}
			})
		}
	}
	t.Run("ended while callers are busy", func(t *testing.T) { s.endUnderLoad(t, id) })
	t.Run("the token serves on", func(t *testing.T) {
		if err := roundTrip(limit(t), s.a, id, []byte("text")); err != nil {
			t.Error(err)
		}
	})
}

func (s *suite) generateWith(ctx context.Context) error {
	_, err := s.a.Generate(ctx, pluginproto.KeySpec{ID: newID(), Type: pluginproto.AES256})
	return err
}

// hsmTimeout is when the core gives a command up. A caller whose context has ended for so
// long waits for the token, and not for a busy machine.
const hsmTimeout = 20 * time.Second

// endUnderLoad has callers in the middle of their work when their context ends.
func (s *suite) endUnderLoad(t *testing.T, id pluginproto.KeyID) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for {
				err := roundTrip(ctx, s.a, id, []byte("text"))
				if err == nil {
					continue
				}
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("error %v, want a deadline", err)
				}
				return
			}
		})
	}
	wg.Wait()
	deadline, _ := ctx.Deadline()
	if late := time.Since(deadline); late > hsmTimeout {
		t.Errorf("the last caller came back %v after the deadline", late)
	}
}
