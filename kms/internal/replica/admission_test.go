package replica_test

import (
	"context"
	"errors"
	"slices"
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
				if holds := len(b.hsm().Keys()) == 1; holds != x.holds || len(h.notes) != 1 {
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
		a.hsm().Lose(h.plan.Copies[0].ID)
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
	if ids := b.hsm().Keys(); len(ids) != 1 || ids[0] != second.ID {
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

func (h *hall) told() []api.Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.events)
}

// admit admits a member as a group does.
func (h *hall) admit(t *testing.T, m replica.Token) (replica.Report, error) {
	t.Helper()
	if _, err := h.Admit(t.Context(), m, false); err != nil {
		return replica.Report{}, err
	}
	return h.Admit(t.Context(), m, true)
}

func TestEmptiedTokenIsNotFilledAgain(t *testing.T) {
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	h := newHall(2)
	h.in = []replica.Token{a}
	one, two := a.make(t, 1), a.make(t, 2)
	two.Members = []string{"hsm-a", "hsm-b"}
	h.plan.Copies = []replica.Copy{one, two}
	for _, x := range []struct {
		name string
		on   []replica.Copy // what hsm-b holds
		held []string       // who is known to hold key one
		fail bool
	}{
		{"a token with none of the keys that it held is failed", nil, nil, true},
		{"so is one that was filled with something else", []replica.Copy{b.make(t, 9)}, []string{"hsm-b"}, true},
		{"one of two keys is enough to be the same token", []replica.Copy{two}, []string{"hsm-b"}, false},
		{"a token that never held a key is filled", nil, []string{"hsm-a"}, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			b := newMember(t, "hsm-b")
			for _, c := range x.on {
				if _, err := replica.Clone(t.Context(), a, b, c); err != nil && c.ID != (pluginproto.KeyID{9}) {
					t.Fatal(err)
				}
			}
			h.plan.Copies[0].Members = x.held
			h.plan.Copies[1].Members = two.Members
			if !x.fail && len(x.on) == 0 {
				h.plan.Copies[1].Members = nil
			}
			before := len(b.hsm().Keys())
			_, err := h.admit(t, b)
			if !x.fail {
				if err != nil || len(b.hsm().Keys()) != 2 {
					t.Errorf("admitted with %v; holds %v", err, b.hsm().Keys())
				}
				return
			}
			var e *pluginproto.Error
			if !errors.As(err, &e) || !e.Permanent || e.Class != pluginproto.ClassMember {
				t.Fatalf("Admit = %v, want a permanent failure of the member", err)
			}
			if !strings.Contains(err.Error(), "re-initialised") || !strings.Contains(err.Error(), "kmsd member replace hsm-b") {
				t.Errorf("it does not say what to do: %v", err)
			}
			if len(b.hsm().Keys()) != before || b.Calls(memdriver.CallCloneStep)+b.Calls(memdriver.CallDestroy) != 0 {
				t.Errorf("hsm-b was changed: %v", b.hsm().Keys())
			}
		})
	}
}

func TestCopyThatIsRefusedKeepsAMemberOutOnce(t *testing.T) {
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	h := newHall(2)
	h.in = []replica.Token{a}
	good, bad := a.make(t, 1), a.make(t, 2)
	h.plan.Copies = []replica.Copy{bad, good}
	full := &pluginproto.Error{Class: pluginproto.ClassBusy, CKR: 0x31, Op: "unwrapping"} // CKR_DEVICE_MEMORY
	target := &picky{member: b, refuse: map[pluginproto.KeyID]error{bad.ID: full}}

	_, err := h.admit(t, target)
	if !errors.Is(err, full) || !strings.Contains(err.Error(), "key c version 1") || len(b.hsm().Keys()) != 1 {
		t.Fatalf("first attempt: %v; holds %v, want all but one", err, b.hsm().Keys())
	}
	r, err := h.admit(t, target)
	if err != nil || len(r.Held) != 1 || len(r.Missing) != 1 || r.Missing[0].ID != bad.ID || len(r.Refused) != 1 {
		t.Fatalf("second attempt: %+v, %v", r, err)
	}
	if target.received != 1 {
		t.Errorf("%d copies were received, want 1", target.received)
	}
	events := h.told()
	if last := events[len(events)-1]; !last.Alarm || last.Member != "hsm-b" || !strings.Contains(last.Cause, "key c version 1") {
		t.Errorf("the last event is %+v, want an alarm that names the key", last)
	}
	r, err = h.admit(t, target) // when it is lost and comes back later, it is not kept out again
	if err != nil || len(r.Refused) != 1 {
		t.Errorf("third attempt: %+v, %v", r, err)
	}
	target.refuse = nil
	if r, err = h.admit(t, target); err != nil || len(r.Missing)+len(r.Refused) != 0 {
		t.Errorf("with room again: %+v, %v", r, err)
	}
}

func TestFullTokenIsNotAskedForEveryKey(t *testing.T) {
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	h := newHall(2)
	h.in = []replica.Token{a}
	full := &pluginproto.Error{Class: pluginproto.ClassUnknown, CKR: 0x31, Op: "unwrapping"}
	target := &picky{member: b, refuse: make(map[pluginproto.KeyID]error)}
	for n := range byte(200) {
		c := a.make(t, n)
		target.refuse[c.ID] = full
		h.plan.Copies = append(h.plan.Copies, c)
	}
	for range 2 {
		_, err := h.admit(t, target)
		if target.refusals > 20 {
			t.Errorf("%d copies were tried in one attempt", target.refusals)
		}
		target.refusals = 0
		if err != nil && !strings.Contains(err.Error(), "and 197 more") {
			t.Errorf("Admit = %v", err)
		}
	}
	if r, _ := h.Found("hsm-b"); len(r.Missing) != 200 {
		t.Errorf("%d keys are missing, want 200", len(r.Missing))
	}
}

func TestInterruptedBulkGoesOnWhereItStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const keys, before = 100, 40
		a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
		h := newHall(2)
		h.in = []replica.Token{a}
		for n := range byte(keys) {
			h.plan.Copies = append(h.plan.Copies, a.make(t, n))
		}
		target := &picky{member: b}
		dying := &mortal{picky: target, left: before}
		_, err := h.admit(t, dying)
		if pluginproto.ClassOf(err) != pluginproto.ClassMember {
			t.Fatalf("Admit = %v, want the loss of the member", err)
		}
		first := target.received
		r, err := h.admit(t, target)
		if err != nil || len(r.Held) != keys || r.Cloned != keys-first {
			t.Fatalf("second attempt: %d held, %d cloned, %v", len(r.Held), r.Cloned, err)
		}
		if target.received != keys {
			t.Errorf("%d copies were received for %d keys", target.received, keys)
		}
	})
}

// mortal is a member that is lost after some clones.
type mortal struct {
	*picky
	left int
}

func (m *mortal) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	m.mu.Lock()
	lost := m.received >= m.left
	m.mu.Unlock()
	if lost {
		return pluginproto.CloneReply{}, &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "cloning"}
	}
	return m.picky.CloneStep(ctx, req)
}

// slow is a member that takes its time for each copy.
type slow struct {
	*member
	each time.Duration
	turn chan struct{}
}

func (s *slow) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	if req.Step == 0 {
		s.turn <- struct{}{}
		<-time.After(s.each)
		<-s.turn
	}
	return s.member.CloneStep(ctx, req)
}

func TestTenThousandKeysShowRateAndTimeLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const keys = 10_000
		a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
		h := newHall(2)
		h.in = []replica.Token{a}
		for n := range keys {
			h.plan.Copies = append(h.plan.Copies, a.make(t, byte(n), byte(n>>8)))
		}
		target := &slow{member: b, each: 2 * time.Millisecond, turn: make(chan struct{}, 1)}
		go func() {
			<-time.After(10*time.Second + time.Millisecond)
			p := h.Progress("hsm-b")
			if p == nil || p.Total != keys || p.Done < 4990 || p.Done > 5000 || p.Rate < 499 || p.Rate > 501 ||
				time.Duration(p.Left) < 10*time.Second || time.Duration(p.Left) > 11*time.Second {
				t.Errorf("after 10 s: %+v, want half of it, 500 per second and 10 s left", p)
			}
		}()
		began := time.Now()
		if r, err := h.admit(t, target); err != nil || len(r.Held) != keys {
			t.Fatalf("%d held, %v", len(r.Held), err)
		}
		took := time.Since(began)
		if took > 21*time.Second {
			t.Errorf("took %v, want 20 s: the relay adds to what the token needs", took)
		}
		events := h.told()
		if n := len(events); n < 35 || n > 42 {
			t.Errorf("%d events in %v, want two per second and one at the end", n, took)
		}
		for i, e := range events {
			if e.Type != api.EventSync || e.Member != "hsm-b" || e.Progress == nil || e.Alarm ||
				i > 0 && e.Progress.Done < events[i-1].Progress.Done {
				t.Errorf("event %d is %+v", i, e)
			}
		}
		if last := events[len(events)-1].Progress; last.Done != keys || last.Left != 0 {
			t.Errorf("the last one says %+v", last)
		}
		if h.Progress("hsm-b") != nil {
			t.Error("there is progress where nothing is being done")
		}
	})
}

func TestUnknownObjectsAreReportedAndLeftAlone(t *testing.T) {
	b := newMember(t, "hsm-b")
	h := newHall(1)
	foreign := b.make(t, 7)
	for range 2 {
		r, err := h.admit(t, b)
		if err != nil || len(r.Foreign) != 1 || r.Foreign[0].ID != foreign.ID || r.Foreign[0].Label != "h/1" {
			t.Errorf("report %+v, %v", r, err)
		}
	}
	if found, ok := h.Found("hsm-b"); !ok || len(found.Foreign) != 1 || len(b.hsm().Keys()) != 1 {
		t.Errorf("found %+v, token holds %v", found, b.hsm().Keys())
	}
	events := h.told()
	if len(events) != 1 || events[0].Alarm || !strings.Contains(events[0].Cause, "group sync --adopt") {
		t.Errorf("events %+v, want one that says how to take them in", events)
	}
}

func TestCompareChangesNothing(t *testing.T) {
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	h := newHall(2)
	h.in = []replica.Token{a}
	wrong, missing, gone := a.make(t, 1), a.make(t, 2), b.make(t, 3)
	b.other(t, wrong)
	h.plan = replica.Plan{Copies: []replica.Copy{wrong, missing}, Gone: map[pluginproto.KeyID]bool{gone.ID: true}}
	r, err := h.Compare(t.Context(), b)
	if err != nil || len(r.Quarantined) != 1 || len(r.Missing) != 1 || len(r.Held)+len(r.Foreign) != 0 {
		t.Errorf("report %+v, %v", r, err)
	}
	if len(b.hsm().Keys()) != 2 || len(h.notes)+len(h.told()) != 0 || h.Quarantined("hsm-b", wrong.ID) {
		t.Error("it was not only looked at")
	}
}

func TestQuarantineIsToldOnceAndEndsWhenTheObjectIsRight(t *testing.T) {
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	h := newHall(3)
	h.in = []replica.Token{a}
	c := a.make(t, 1)
	h.plan.Copies = []replica.Copy{c}
	b.other(t, c)
	for range 3 { // it is lost and comes back
		if r, err := h.admit(t, b); err != nil || len(r.Quarantined) != 1 {
			t.Fatalf("report %+v, %v", r, err)
		}
	}
	events := h.told()
	if len(events) != 1 || !events[0].Alarm || events[0].Key != c.Key || !h.Quarantined("hsm-b", c.ID) {
		t.Errorf("events %+v, want one alarm", events)
	}
	late := newMember(t, "hsm-c")
	h.in = []replica.Token{b, a} // and it is no source
	if r, err := h.admit(t, late); err != nil || r.Cloned != 1 {
		t.Errorf("hsm-c: %+v, %v", r, err)
	}
	if b.Calls(memdriver.CallCloneStep) != 0 {
		t.Error("hsm-b was asked for a copy that is in quarantine")
	}
	b.hsm().Lose(c.ID)
	if r, err := h.admit(t, b); err != nil || r.Cloned != 1 || h.Quarantined("hsm-b", c.ID) {
		t.Errorf("after it was removed: %+v, %v", r, err)
	}
}
