package replica_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"kmsd/internal/leaktest"
	"kmsd/internal/memdriver"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// member is a driver in memory under a name.
type member struct {
	*memdriver.Driver
	name string
	info pluginproto.TokenInfo
}

func (m *member) Name() string                 { return m.name }
func (m *member) Token() pluginproto.TokenInfo { return m.info }
func (m *member) hsm() *memdriver.Token        { return m.Driver.Token() }

func newMember(t *testing.T, name string) *member {
	t.Helper()
	return newMemberOf(t, name, memdriver.Options{})
}

func newMemberOf(t *testing.T, name string, opts memdriver.Options) *member {
	t.Helper()
	opts.Token = memdriver.NewToken(name)
	d := memdriver.New(opts)
	info, err := d.Open(t.Context(), pluginproto.OpenRequest{PIN: []byte(memdriver.PIN), Domain: bytes.Repeat([]byte{7}, 32)})
	if err != nil {
		t.Fatal(err)
	}
	return &member{d, name, info}
}

// make makes a key on the member and returns what copies of it should be.
func (m *member) make(t *testing.T, n byte, more ...byte) replica.Copy {
	t.Helper()
	key := string('a' + rune(n))
	id := pluginproto.KeyID{n}
	copy(id[1:], more)
	o, err := m.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256, Label: key + "/1"})
	if err != nil {
		t.Fatal(err)
	}
	return replica.Copy{ID: o.ID, Type: o.Type, CheckValue: o.CheckValue, Key: key, Version: 1}
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
	if req.End {
		return pluginproto.CloneReply{}, nil
	}
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
		return pluginproto.CloneReply{Done: true, Keys: []pluginproto.CloneResult{{Object: &o}}}
	}
	right := func(*pluginproto.Object) {}
	silent := object(right)
	silent.Done = false
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
		{"the source does not say what it gives", &odd{a, reply(pluginproto.CloneReply{})}, b,
			true, pluginproto.ClassUnknown, "the driver does not say what it gives"},
		{"the source has another value", &odd{a, reply(object(func(o *pluginproto.Object) { o.CheckValue = []byte{1} }))}, &odd{b, nil},
			true, pluginproto.ClassUnknown, "cloning from member hsm-a: comparing the copy of member hsm-a: the key has another value"},
		{"both talk for ever", &odd{a, reply(silent)}, &odd{b, reply(pluginproto.CloneReply{})},
			false, pluginproto.ClassUnknown, "came to no end"},
		{"the source is done and the target is not", &odd{a, reply(object(right))}, &odd{b, reply(pluginproto.CloneReply{})},
			false, pluginproto.ClassUnknown, "came to no end"},
		{"the target does not say what it has", a, &odd{b, reply(pluginproto.CloneReply{Done: true})},
			false, pluginproto.ClassUnknown, "does not say what it has received"},
		{"the target has another identity", a, &odd{b, reply(object(func(o *pluginproto.Object) { o.ID[0]++ }))},
			false, pluginproto.ClassUnknown, "identity is 02"},
		{"the target has another type", a, &odd{b, reply(object(func(o *pluginproto.Object) { o.Type = pluginproto.AES128 }))},
			false, pluginproto.ClassUnknown, "type is aes-128, want aes-256"},
		{"the target has another value", a, &odd{b, reply(object(func(o *pluginproto.Object) { o.CheckValue = []byte{1} }))},
			false, pluginproto.ClassUnknown, "check value is 01, want"},
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
	a.hsm().Lose(orphan.ID)
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
	sources := from(b, a)
	r, err := s.Apply(t.Context(), plan, sources)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Held) != 2 || r.Cloned != 1 || len(r.Missing) != 1 || r.Missing[0].ID != orphan.ID || len(r.Destroyed) != 1 ||
		len(r.Foreign) != 1 || r.Foreign[0].ID != foreign.ID || r.Foreign[0].Label != "g/1" {
		t.Errorf("report %+v", r)
	}
	if ids := b.hsm().Keys(); len(ids) != 4 || ids[0] != both.ID || ids[1] != missing.ID || ids[2] != open.ID || ids[3] != foreign.ID {
		t.Errorf("hsm-b holds %v", ids)
	}

	// Applied again, only what is new costs anything.
	steps := b.Calls(memdriver.CallCloneStep)
	plan.Copies = append(plan.Copies[:2], a.make(t, 7))
	plan.Gone[both.ID] = true // a key that is wanted is not destroyed
	if r, err = s.Apply(t.Context(), plan, sources); err != nil || len(r.Held) != 3 || r.Cloned != 2 {
		t.Errorf("second report %+v, %v", r, err)
	}
	if n := b.Calls(memdriver.CallCloneStep) - steps; n > 2 || b.Calls(memdriver.CallList) != 1 {
		t.Errorf("%d more clone steps and %d lists", n, b.Calls(memdriver.CallList))
	}
}

func from(members ...replica.Token) replica.Sources {
	return replica.Sources{Of: func(replica.Copy) []replica.Token { return members }}
}

func TestSyncEndsWhenTheMemberIsLost(t *testing.T) {
	broken := &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "calling"}
	for _, x := range []struct {
		name string
		call memdriver.Call
		text string
	}{
		{"while it takes a copy", memdriver.CallCloneStep, "cloning key b version 1 to member hsm-b"},
		{"while it destroys", memdriver.CallDestroy, "on member hsm-b: calling: CKR_DEVICE_ERROR"},
		{"while a label is set right", memdriver.CallSetAttributes, "setting the label of key d version 1 on member hsm-b"},
	} {
		t.Run(x.name, func(t *testing.T) {
			a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
			wanted, gone, named := a.make(t, 1), b.make(t, 2), b.make(t, 3)
			b.label(t, named, "something else")
			b.Script(memdriver.Fault{Call: x.call, Err: broken})
			s, err := replica.NewSync(t.Context(), b)
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.Apply(t.Context(), replica.Plan{
				Copies: []replica.Copy{wanted, named}, Gone: map[pluginproto.KeyID]bool{gone.ID: true},
			}, from(a))
			if !errors.Is(err, broken) || !strings.Contains(err.Error(), x.text) {
				t.Errorf("Apply = %v, want %q", err, x.text)
			}
		})
	}
}

func (m *member) label(t *testing.T, c replica.Copy, label string) {
	t.Helper()
	if err := m.SetAttributes(t.Context(), c.ID, pluginproto.Attributes{Label: &label}); err != nil {
		t.Fatal(err)
	}
}

func (m *member) labelOf(t *testing.T, c replica.Copy) string {
	t.Helper()
	o, err := m.Inspect(t.Context(), c.ID)
	if err != nil {
		t.Fatal(err)
	}
	return o.Label
}

func TestOtherLabelsAreSetRight(t *testing.T) {
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	held, missing := b.make(t, 1), a.make(t, 2)
	b.label(t, held, "old")
	a.label(t, missing, "older") // which the copy inherits
	namesake := b.make(t, 3)     // a foreign key with the label of ours stays foreign
	b.label(t, namesake, missing.Label())
	s, err := replica.NewSync(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	plan := replica.Plan{Copies: []replica.Copy{held, missing}}
	for range 2 { // the second time there is nothing left
		r, err := s.Apply(t.Context(), plan, from(a))
		if err != nil || r.Changed != 2 || r.Cloned != 1 || len(r.Foreign) != 1 || r.Foreign[0].ID != namesake.ID {
			t.Errorf("report %+v, %v", r, err)
		}
	}
	if n := b.Calls(memdriver.CallSetAttributes); n != 4 { // two of them the test's
		t.Errorf("labels were set %d times", n)
	}
	for _, c := range plan.Copies {
		if got := b.labelOf(t, c); got != c.Label() {
			t.Errorf("label is %q, want %q", got, c.Label())
		}
	}
}

func TestDifferentValueIsQuarantinedAndKeepsNobodyOut(t *testing.T) {
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	wanted, missing, gone := a.make(t, 1), a.make(t, 2), b.make(t, 3)
	b.other(t, wanted)
	s, err := replica.NewSync(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	before, err := b.Inspect(t.Context(), wanted.ID)
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.Apply(t.Context(), replica.Plan{
		Copies: []replica.Copy{wanted, missing}, Gone: map[pluginproto.KeyID]bool{gone.ID: true},
	}, from(a))
	if err != nil || len(r.Quarantined) != 1 || r.Quarantined[0].ID != wanted.ID || len(r.Held) != 1 || len(r.Destroyed) != 1 || len(r.Missing) != 0 {
		t.Fatalf("report %+v, %v", r, err)
	}
	if got := r.Quarantined[0].Found.CheckValue; !bytes.Equal(got, before.CheckValue) || s.Holds(wanted) {
		t.Errorf("found %x, want %x; holds %v", got, before.CheckValue, s.Holds(wanted))
	}
	if after, err := b.Inspect(t.Context(), wanted.ID); err != nil || !bytes.Equal(after.CheckValue, before.CheckValue) {
		t.Errorf("the other key was touched: %+v, %v", after, err)
	}
}

func TestWrongSourceGivesNothingAway(t *testing.T) {
	a, b, c := newMember(t, "hsm-a"), newMember(t, "hsm-b"), newMember(t, "hsm-c")
	wanted := a.make(t, 1)
	b.other(t, wanted) // in step, and swapped behind its driver's back
	var blamed []string
	s, err := replica.NewSync(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	sources := from(b, a)
	sources.Wrong = func(source string, err error) {
		if errors.Is(err, replica.ErrDifferent) {
			blamed = append(blamed, source)
		}
	}
	r, err := s.Apply(t.Context(), replica.Plan{Copies: []replica.Copy{wanted}}, sources)
	if err != nil || r.Cloned != 1 || len(r.Held) != 1 || len(blamed) != 1 || blamed[0] != "hsm-b" {
		t.Errorf("report %+v, %v; blamed %v", r, err, blamed)
	}
}

func TestRefusalsDoNotKeepTheRestFromComing(t *testing.T) {
	a, b := newMember(t, "hsm-a"), newMember(t, "hsm-b")
	good, bad, named, gone := a.make(t, 1), a.make(t, 2), b.make(t, 3), b.make(t, 4)
	b.label(t, named, "old")
	full := &pluginproto.Error{Class: pluginproto.ClassBusy, CKR: 0x31, Op: "unwrapping"} // CKR_DEVICE_MEMORY
	target := &picky{member: b, refuse: map[pluginproto.KeyID]error{bad.ID: full, named.ID: full, gone.ID: full}}
	s, err := replica.NewSync(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	plan := replica.Plan{Copies: []replica.Copy{good, bad, named}, Gone: map[pluginproto.KeyID]bool{gone.ID: true}}
	for range 2 { // what was refused is not tried again
		r, err := s.Apply(t.Context(), plan, from(a))
		if err != nil || r.Cloned != 1 || len(r.Held) != 2 || len(r.Missing) != 1 || len(r.Refused) != 3 {
			t.Fatalf("report %+v, %v", r, err)
		}
	}
	if target.refusals != 3 {
		t.Errorf("%d refusals, want 3", target.refusals)
	}
}

// picky is a member that refuses to touch some identities.
type picky struct {
	*member
	refuse   map[pluginproto.KeyID]error
	mu       sync.Mutex
	refusals int
	received int
}

func (p *picky) refuses(id pluginproto.KeyID) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refuse[id] != nil {
		p.refusals++
	}
	return p.refuse[id]
}

func (p *picky) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	if req.End {
		return p.member.CloneStep(ctx, req)
	}
	if err := p.refuses(req.Keys[0]); err != nil {
		return pluginproto.CloneReply{}, err
	}
	r, err := p.member.CloneStep(ctx, req)
	if r.Done && req.Role == pluginproto.CloneTarget {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.received++
	}
	return r, err
}

func (p *picky) SetAttributes(ctx context.Context, id pluginproto.KeyID, attrs pluginproto.Attributes) error {
	if err := p.refuses(id); err != nil {
		return err
	}
	return p.member.SetAttributes(ctx, id, attrs)
}

func (p *picky) Destroy(ctx context.Context, id pluginproto.KeyID) error {
	if err := p.refuses(id); err != nil {
		return err
	}
	return p.member.Destroy(ctx, id)
}
