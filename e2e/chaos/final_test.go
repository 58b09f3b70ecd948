package chaos_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync"
	"testing"
	"time"

	"kmsd/e2e/chaos"
	"kmsd/e2e/look"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
)

// inspect waits until the group is whole, rekeys the database, opens every envelope that was
// ever handed out, ends kmsd, and looks at the catalog and the tokens themselves.
func (s *site) inspect(t *testing.T, l *load) chaos.Final {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	final := chaos.Final{States: map[string]api.State{}, Unverified: map[string]string{}, Tokens: map[string]map[string]string{}, Bytes: map[string]map[string]string{}}
	if _, err := devserver.AwaitWhole(ctx, s.operator); err != nil {
		t.Fatal(err)
	}
	l.shop.settle(ctx, t, &final)
	s.askKeys(ctx, t, l, &final)
	l.unwrapAll()
	if err := s.server.Stop(ctx); err != nil {
		t.Error(err)
	}
	s.readDisks(ctx, t, &final)
	return final
}

// askKeys takes down what kmsd says of every key. Those that an operator could not
// enable again during the faults are enabled, so that their envelopes can be opened.
func (s *site) askKeys(ctx context.Context, t *testing.T, l *load, final *chaos.Final) {
	t.Helper()
	for after := ""; ; {
		page, err := s.operator.Keys(ctx, api.ListOptions{After: after, Limit: 1000})
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range page.Keys {
			final.States[k.Name] = k.State
			if k.State == api.StateDisabled {
				l.change(chaos.Enable, k.Name)
			}
			if k.State == api.StateDestroyed {
				continue
			}
			if v, err := s.operator.Verify(ctx, k.Name); err != nil {
				final.Unverified[k.Name] = err.Error()
			} else if !v.OK {
				final.Unverified[k.Name] = fmt.Sprintf("%+v", v.Copies)
			}
		}
		if after = page.Next; after == "" {
			return
		}
	}
}

// unwrapAll opens every envelope, those of destroyed keys too, which must not work.
func (l *load) unwrapAll() {
	const atOnce = 32
	l.mu.Lock()
	all := l.envelopes
	l.mu.Unlock()
	next := make(chan envelope)
	var wg sync.WaitGroup
	for range atOnce {
		wg.Go(func() {
			for e := range next {
				l.unwrap(e)
			}
		})
	}
	for _, e := range all {
		next <- e
	}
	close(next)
	wg.Wait()
}

// readDisks looks at the catalog and the tokens past kmsd, which has ended.
func (s *site) readDisks(ctx context.Context, t *testing.T, final *chaos.Final) {
	t.Helper()
	cat, err := look.ReadCatalog(ctx, s.cfg.Catalog.Bolt.Path)
	if err != nil {
		t.Fatal(err)
	}
	final.Living, final.Gone, final.Open = cat.Living, cat.Gone, cat.Open
	for i, h := range s.hsms {
		d, end, err := s.open(ctx, h)
		if err != nil {
			t.Fatal(err)
		}
		objects, err := d.List(ctx)
		if i == 0 && err == nil {
			readNamed(ctx, t, d, cat, final)
		}
		end()
		if err != nil {
			t.Fatal(err)
		}
		held := map[string]string{}
		for _, o := range objects {
			held[o.ID.String()] = checkValue(o.CheckValue)
		}
		final.Tokens[h.name] = held
		if k, ok := h.token.(*lunaToken); ok {
			final.Bytes[h.name] = k.bytes()
		}
	}
}

// random returns n random bytes.
func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}
