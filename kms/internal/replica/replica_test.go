package replica_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"kmsd/internal/memdriver"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// member is a driver in memory under a name.
type member struct {
	*memdriver.Driver
	name string
}

func (m *member) Name() string { return m.name }

func newMember(t *testing.T, name string) *member {
	t.Helper()
	d := memdriver.New(memdriver.Options{Token: memdriver.NewToken(name)})
	if _, err := d.Open(t.Context(), pluginproto.OpenRequest{PIN: []byte(memdriver.PIN), Domain: bytes.Repeat([]byte{7}, 32)}); err != nil {
		t.Fatal(err)
	}
	return &member{d, name}
}

// make makes a key on the member and returns what copies of it should be.
func (m *member) make(t *testing.T, n byte) replica.Copy {
	t.Helper()
	o, err := m.Generate(t.Context(), pluginproto.KeySpec{ID: pluginproto.KeyID{n}, Type: pluginproto.AES256})
	if err != nil {
		t.Fatal(err)
	}
	return replica.Copy{ID: o.ID, Type: o.Type, CheckValue: o.CheckValue, Key: string('a' + rune(n)), Version: 1}
}

// other is a copy of c's name and identity with another value.
func (m *member) other(t *testing.T, c replica.Copy) {
	t.Helper()
	if _, err := m.Generate(t.Context(), pluginproto.KeySpec{ID: c.ID, Type: c.Type}); err != nil {
		t.Fatal(err)
	}
}

func TestCloneCopiesAndIsIdempotent(t *testing.T) {
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	c := a.make(t, 1)
	for range 2 {
		o, err := replica.Clone(t.Context(), a, b, c)
		if err != nil || !bytes.Equal(o.CheckValue, c.CheckValue) {
			t.Fatalf("Clone = %+v, %v", o, err)
		}
	}
}

// odd is a member whose clone steps are scripted.
type odd struct {
	*member
	step func(pluginproto.CloneRequest) (pluginproto.CloneReply, error)
}

func (o *odd) CloneStep(_ context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	return o.step(req)
}

func TestCloneThatFails(t *testing.T) {
	broken := &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "wrapping"}
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	c := a.make(t, 1)
	reply := func(r pluginproto.CloneReply) func(pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
		return func(pluginproto.CloneRequest) (pluginproto.CloneReply, error) { return r, nil }
	}
	object := func(change func(*pluginproto.Object)) pluginproto.CloneReply {
		o := pluginproto.Object{ID: c.ID, Type: c.Type, CheckValue: c.CheckValue}
		change(&o)
		return pluginproto.CloneReply{Done: true, Object: &o}
	}
	for _, x := range []struct {
		name     string
		from, to replica.Token
		source   bool // it is the source's failure
		class    pluginproto.Class
		text     string
	}{
		{"the source breaks", &odd{a, func(pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
			return pluginproto.CloneReply{}, broken
		}}, b,
			true, pluginproto.ClassUnknown, "cloning from member hsm-a: wrapping: CKR_DEVICE_ERROR"},
		{"the source does not have it", newMember(t, "hsm-c"), b, true, pluginproto.ClassUnknown, "cloning from member hsm-c"},
		{"the source says too much", &odd{a, reply(pluginproto.CloneReply{Blob: make([]byte, 2<<20)})}, b,
			true, pluginproto.ClassUnknown, "the driver's message has 2097152 bytes"},
		{"the target breaks", a, &odd{b, func(pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
			return pluginproto.CloneReply{}, broken
		}},
			false, pluginproto.ClassMember, "cloning key b version 1 to member hsm-b: wrapping: CKR_DEVICE_ERROR"},
		{"the target says too much", a, &odd{b, reply(pluginproto.CloneReply{Blob: make([]byte, 2<<20)})},
			false, pluginproto.ClassUnknown, "the driver's message has 2097152 bytes"},
		{"both talk for ever", &odd{a, reply(pluginproto.CloneReply{})}, &odd{b, reply(pluginproto.CloneReply{})},
			false, pluginproto.ClassUnknown, "came to no end"},
		{"the source is done and the target is not", &odd{a, reply(pluginproto.CloneReply{Done: true})}, &odd{b, reply(pluginproto.CloneReply{})},
			false, pluginproto.ClassUnknown, "came to no end"},
		{"the target does not say what it has", a, &odd{b, reply(pluginproto.CloneReply{Done: true})},
			false, pluginproto.ClassUnknown, "does not say what it has received"},
		{"the target has another identity", a, &odd{b, reply(object(func(o *pluginproto.Object) { o.ID[0]++ }))},
			false, pluginproto.ClassMember, "identity is 02"},
		{"the target has another type", a, &odd{b, reply(object(func(o *pluginproto.Object) { o.Type = pluginproto.AES128 }))},
			false, pluginproto.ClassMember, "type is aes-128, want aes-256"},
		{"the target has another value", a, &odd{b, reply(object(func(o *pluginproto.Object) { o.CheckValue = []byte{1} }))},
			false, pluginproto.ClassMember, "check value is 01, want"},
	} {
		t.Run(x.name, func(t *testing.T) {
			_, err := replica.Clone(t.Context(), x.from, x.to, c)
			if err == nil || !strings.Contains(err.Error(), x.text) {
				t.Fatalf("Clone = %v, want %q", err, x.text)
			}
			if _, source := errors.AsType[*replica.SourceError](err); source != x.source {
				t.Errorf("blames the source: %v", source)
			}
			if class := pluginproto.ClassOf(err); class != x.class {
				t.Errorf("class %v, want %v", class, x.class)
			}
		})
	}
}

func TestSyncMakesTheMemberHoldThePlan(t *testing.T) {
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	both, missing, orphan := a.make(t, 1), a.make(t, 2), a.make(t, 3)
	a.Token().Lose(orphan.ID)
	gone, open, foreign := b.make(t, 4), b.make(t, 5), b.make(t, 6)
	if _, err := replica.Clone(t.Context(), a, b, both); err != nil {
		t.Fatal(err)
	}
	s, err := replica.NewSync(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	if !s.Holds(both) || s.Holds(missing) {
		t.Errorf("before: holds %v and %v, want true and false", s.Holds(both), s.Holds(missing))
	}
	plan := replica.Plan{
		Copies: []replica.Copy{both, missing, orphan},
		Gone:   map[pluginproto.KeyID]bool{gone.ID: true, {99}: true},
		Open:   map[pluginproto.KeyID]bool{open.ID: true},
	}
	sources := func(replica.Copy) []replica.Token { return []replica.Token{b, a} }
	r, err := s.Apply(t.Context(), plan, sources)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Held) != 2 || r.Cloned != 1 || len(r.Missing) != 1 || r.Missing[0].ID != orphan.ID || len(r.Destroyed) != 1 || r.Foreign != 1 {
		t.Errorf("report %+v", r)
	}
	if ids := b.Token().Keys(); len(ids) != 4 || ids[0] != both.ID || ids[1] != missing.ID || ids[2] != open.ID || ids[3] != foreign.ID {
		t.Errorf("hsm-b holds %v", ids)
	}

	// Applied again, only what is new costs anything.
	steps := b.Calls(memdriver.CallCloneStep)
	plan.Copies = append(plan.Copies[:2], a.make(t, 7))
	plan.Gone[both.ID] = true // a key that is wanted is not destroyed
	if r, err = s.Apply(t.Context(), plan, sources); err != nil || len(r.Held) != 3 || r.Cloned != 1 {
		t.Errorf("second report %+v, %v", r, err)
	}
	if n := b.Calls(memdriver.CallCloneStep) - steps; n > 2 || b.Calls(memdriver.CallList) != 1 {
		t.Errorf("%d more clone steps and %d lists", n, b.Calls(memdriver.CallList))
	}
}

func TestSyncThatFails(t *testing.T) {
	broken := &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "calling"}
	for _, x := range []struct {
		name string
		harm func(t *testing.T, a, b *member, wanted, gone replica.Copy)
		want error
		text string
	}{
		{"another value under a known identity", func(t *testing.T, _, b *member, wanted, _ replica.Copy) { b.other(t, wanted) },
			replica.ErrDifferent, "key b version 1: check value is"},
		{"the only source breaks", func(_ *testing.T, a, _ *member, _, _ replica.Copy) {
			a.Script(memdriver.Fault{Call: memdriver.CallCloneStep, Err: broken})
		}, nil, "cloning from member hsm-a: calling: CKR_DEVICE_ERROR"},
		{"the member breaks while it takes a copy", func(_ *testing.T, _, b *member, _, _ replica.Copy) {
			b.Script(memdriver.Fault{Call: memdriver.CallCloneStep, Err: broken})
		}, broken, "cloning key b version 1 to member hsm-b"},
		{"the member breaks while it destroys", func(_ *testing.T, _, b *member, _, _ replica.Copy) {
			b.Script(memdriver.Fault{Call: memdriver.CallDestroy, Err: broken})
		}, broken, "on member hsm-b: calling: CKR_DEVICE_ERROR"},
	} {
		t.Run(x.name, func(t *testing.T) {
			a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
			wanted, gone := a.make(t, 1), b.make(t, 2)
			x.harm(t, a, b, wanted, gone)
			s, err := replica.NewSync(t.Context(), b)
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.Apply(t.Context(), replica.Plan{Copies: []replica.Copy{wanted}, Gone: map[pluginproto.KeyID]bool{gone.ID: true}},
				func(replica.Copy) []replica.Token { return []replica.Token{a} })
			if err == nil || x.want != nil && !errors.Is(err, x.want) || !strings.Contains(err.Error(), x.text) {
				t.Errorf("Apply = %v, want %q", err, x.text)
			}
		})
	}
}

func TestDifferentValueChangesNothing(t *testing.T) {
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	wanted, missing, gone := a.make(t, 1), a.make(t, 2), b.make(t, 3)
	b.other(t, wanted)
	s, err := replica.NewSync(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Apply(t.Context(), replica.Plan{
		Copies: []replica.Copy{wanted, missing}, Gone: map[pluginproto.KeyID]bool{gone.ID: true},
	}, func(replica.Copy) []replica.Token { return []replica.Token{a} })
	var e *pluginproto.Error
	if !errors.As(err, &e) || !e.Permanent || e.Class != pluginproto.ClassMember {
		t.Errorf("Apply = %v, want a permanent failure of the member", err)
	}
	if len(b.Token().Keys()) != 2 || b.Calls(memdriver.CallDestroy)+b.Calls(memdriver.CallCloneStep) != 0 {
		t.Errorf("hsm-b was changed: %v", b.Token().Keys())
	}
}

// book is a plan in memory.
type book struct {
	plan  replica.Plan
	notes []string
	err   error
}

func (b *book) Plan(context.Context) (replica.Plan, error) { return b.plan, b.err }

func (b *book) Note(_ context.Context, member string, _ replica.Plan, _ replica.Report) error {
	b.notes = append(b.notes, member)
	return b.err
}

// hall is a group of members in step.
type hall struct {
	*replica.Admission
	*book
	in []replica.Token
}

func newHall(members int) *hall {
	h := &hall{book: &book{}}
	h.Admission = replica.NewAdmission(replica.Config{
		Book: h.book, Members: members,
		InStep: func() []replica.Token { return append([]replica.Token(nil), h.in...) },
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
						if err := h.Admit(t.Context(), a, false); err != nil {
							t.Error(err)
						}
					}()
				}
				began := time.Now()
				for _, last := range []bool{false, true} {
					if err := h.Admit(t.Context(), b, last); err != nil {
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
		if err := h.Admit(t.Context(), b, false); err != nil || time.Since(began) != 0 {
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
	if err := h.Admit(t.Context(), b, false); err != nil {
		t.Fatal(err)
	}
	second := a.make(t, 2)
	h.plan = replica.Plan{Copies: []replica.Copy{second}, Gone: map[pluginproto.KeyID]bool{first.ID: true}}
	if err := h.Admit(t.Context(), b, true); err != nil {
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
		if err := h.Admit(ctx, b, false); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Admit = %v", err)
		}
	})
}

func TestAdmissionNeedsTheCatalog(t *testing.T) {
	h := newHall(1)
	h.err = errors.New("the disk is gone")
	err := h.Admit(t.Context(), newMember(t, "hsm-a"), true)
	if !errors.Is(err, h.err) || !strings.Contains(err.Error(), "reading what member hsm-a should hold") {
		t.Errorf("Admit = %v", err)
	}
}
