package p11_test

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// Keys come and go while commands run, with everything that a driver can do side
// by side. SoftHSM loses objects or crashes when its threads are not kept apart.
func TestKeysComeAndGoBesideCommands(t *testing.T) {
	const rounds = 3
	b := newBench(t, "token-a", "token-b")
	source := b.open(t)
	b.settings["token_label"] = "token-b"
	target := b.open(t)
	aes, ec := generate(t, source, pluginproto.AES256).ID, generate(t, source, pluginproto.ECP256).ID

	ctx, stop := context.WithCancel(t.Context())
	var commands sync.WaitGroup
	for n := range 8 {
		commands.Go(func() {
			for ctx.Err() == nil {
				if err := oneOf(t.Context(), source, n, aes, ec); err != nil {
					t.Errorf("a command: %v", err)
					return
				}
			}
		})
	}
	var management sync.WaitGroup
	for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.ECP256, pluginproto.RSA2048} {
		management.Go(func() {
			for range rounds {
				if err := lifeOfAKey(t, typ, source, target); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	management.Wait()
	stop()
	commands.Wait()
	if all, err := source.List(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("%d keys are left at the source, %v", len(all), err)
	}
	if all, err := target.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("%d keys are left at the target, %v", len(all), err)
	}
}

// lifeOfAKey makes a key, clones it and destroys both.
func lifeOfAKey(t *testing.T, typ pluginproto.KeyType, source, target *p11.Driver) error {
	o, err := source.Generate(t.Context(), pluginproto.KeySpec{ID: newID(), Type: typ, Label: "passing"})
	if err != nil {
		return fmt.Errorf("generating %s: %w", typ, err)
	}
	if err := tryClone(t, source, target, o.ID); err != nil {
		return fmt.Errorf("cloning: %w", err)
	}
	if err := target.Destroy(t.Context(), o.ID); err != nil {
		return fmt.Errorf("destroying the copy: %w", err)
	}
	if err := source.Destroy(t.Context(), o.ID); err != nil {
		return fmt.Errorf("destroying the key: %w", err)
	}
	return nil
}
