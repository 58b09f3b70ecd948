package replica_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms/api"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// book is a plan in memory.
type book struct {
	plan replica.Plan
	err  error

	noting sync.Mutex // guards notes
	notes  []string
}

func (b *book) Plan(context.Context) (replica.Plan, error) { return b.plan, b.err }

func (b *book) Learn(context.Context, string, replica.Report) error { return b.err }

func (b *book) Note(_ context.Context, member string, _ replica.Plan, _ replica.Report) error {
	b.noting.Lock()
	defer b.noting.Unlock()
	b.notes = append(b.notes, member)
	return b.err
}

// hall is a group of members in step.
type hall struct {
	*replica.Admission
	*book
	in []replica.Token

	mu     sync.Mutex // guards events
	events []api.Event
}

func newHall(members int) *hall {
	h := &hall{book: &book{}}
	h.Admission = replica.NewAdmission(replica.Config{
		Book: h.book, Members: func() int { return members },
		InStep: func() []replica.Token { return append([]replica.Token(nil), h.in...) },
		Events: func(e api.Event) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.events = append(h.events, e)
		},
	})
	return h
}

func TestAdmissionWaitsForASource(t *testing.T) {
	for _, x := range []struct {
		name  string
		comes time.Duration // when the member with the key comes; 0: never
		took  time.Duration
		holds bool
	}{
		{"a source comes in time", time.Second, time.Second, true},
		{"no source comes", 0, 2 * time.Second, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
				h := newHall(3)
				h.plan.Copies = []replica.Copy{a.make(t, 1)}
				if x.comes > 0 {
					go func() {
						<-time.After(x.comes)
						if _, err := h.Admit(t.Context(), a, false); err != nil {
							t.Error(err)
						}
					}()
				}
				began := time.Now()
				for _, last := range []bool{false, true} {
					if _, err := h.Admit(t.Context(), b, last); err != nil {
						t.Fatal(err)
					}
				}
				if took := time.Since(began); took != x.took {
					t.Errorf("took %v, want %v", took, x.took)
				}
				if holds := len(b.Token().Keys()) == 1; holds != x.holds || len(h.notes) != 1 {
					t.Errorf("holds %v, want %v; notes %v", holds, x.holds, h.notes)
				}
			})
		})
	}
}

func TestAdmissionDoesNotWaitWhenAllAreThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
		h := newHall(2)
		h.in = []replica.Token{a}
		h.plan.Copies = []replica.Copy{a.make(t, 1)}
		a.Token().Lose(h.plan.Copies[0].ID)
		began := time.Now()
		if _, err := h.Admit(t.Context(), b, false); err != nil || time.Since(began) != 0 {
			t.Errorf("Admit = %v after %v", err, time.Since(began))
		}
	})
}

func TestAdmissionFindsInTheLastLookWhatChanged(t *testing.T) {
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	h := newHall(2)
	h.in = []replica.Token{a}
	first := a.make(t, 1)
	h.plan.Copies = []replica.Copy{first}
	if _, err := h.Admit(t.Context(), b, false); err != nil {
		t.Fatal(err)
	}
	second := a.make(t, 2)
	h.plan = replica.Plan{Copies: []replica.Copy{second}, Gone: map[pluginproto.KeyID]bool{first.ID: true}}
	if _, err := h.Admit(t.Context(), b, true); err != nil {
		t.Fatal(err)
	}
	if ids := b.Token().Keys(); len(ids) != 1 || ids[0] != second.ID {
		t.Errorf("hsm-b holds %v, want %v", ids, second.ID)
	}
	if n := b.Calls(memdriver.CallList); n != 1 {
		t.Errorf("listed %d times", n)
	}
}

func TestAdmissionEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
		h := newHall(2)
		h.plan.Copies = []replica.Copy{a.make(t, 1)}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := h.Admit(ctx, b, false); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Admit = %v", err)
		}
	})
}

func TestAdmissionNeedsTheCatalog(t *testing.T) {
	h := newHall(1)
	h.err = errors.New("the disk is gone")
	_, err := h.Admit(t.Context(), newMember(t, "hsm-a"), true)
	if !errors.Is(err, h.err) || !strings.Contains(err.Error(), "reading what member hsm-a should hold") {
		t.Errorf("Admit = %v", err)
	}
}
