package replica_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"kmsd/internal/memdriver"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// newCarrier returns a member whose transfers carry many keys.
func newCarrier(t *testing.T, name string, keys int) *member {
	t.Helper()
	return newMemberOf(t, name, memdriver.Options{CloneKeys: keys})
}

// makeMany makes n keys on the member.
func (m *member) makeMany(t *testing.T, n int) []replica.Copy {
	t.Helper()
	copies := make([]replica.Copy, n)
	for i := range copies {
		copies[i] = m.make(t, 1, byte(i>>8), byte(i))
	}
	return copies
}

func apply(t *testing.T, to replica.Token, copies []replica.Copy, sources replica.Sources) replica.Report {
	t.Helper()
	s, err := replica.NewSync(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.Apply(t.Context(), replica.Plan{Copies: copies}, sources)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestKeysComeInAsFewTransfersAsTheTokensCan(t *testing.T) {
	for _, x := range []struct {
		name                 string
		source, target, keys int
		steps                int // at each end; a transfer has two
	}{
		{"a thousand keys, fifty in a transfer", 50, 50, 1000, 40},
		{"the last transfer carries what is left", 50, 50, 120, 6},
		{"the end that carries less decides", 50, 8, 40, 10},
		{"one in a transfer", 1, 50, 30, 60},
		{"one key that is left goes alone", 50, 50, 51, 4},
	} {
		t.Run(x.name, func(t *testing.T) {
			a, b := newCarrier(t, "hsm-a", x.source), newCarrier(t, "hsm-b", x.target)
			copies := a.makeMany(t, x.keys)
			r := apply(t, b, copies, from(a))
			if r.Cloned != x.keys || len(r.Held) != x.keys {
				t.Errorf("%d cloned and %d held, want %d", r.Cloned, len(r.Held), x.keys)
			}
			if at, to := a.Calls(memdriver.CallCloneStep), b.Calls(memdriver.CallCloneStep); at != x.steps || to != x.steps {
				t.Errorf("%d steps at the source and %d at the target, want %d", at, to, x.steps)
			}
		})
	}
}

// balky is a member that has something against some transfers.
type balky struct {
	*member
	against func(pluginproto.CloneRequest) error
}

func (b *balky) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	if err := b.against(req); err != nil {
		return pluginproto.CloneReply{}, err
	}
	return b.member.CloneStep(ctx, req)
}

func TestWhatDoesNotComeTogetherComesAlone(t *testing.T) {
	broken := &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "wrapping"}
	muddled := pluginproto.Errorf(pluginproto.ClassCaller, "cloning", "the blob does not authenticate")
	for _, x := range []struct {
		name    string
		spoil   func(t *testing.T, a, b *member, copies []replica.Copy)
		source  func(pluginproto.CloneRequest) error // what hsm-a has against a step
		target  func(pluginproto.CloneRequest) error
		cloned  int // of 6
		refused int
		blamed  string
	}{
		{name: "the source lacks some, which the next one has", cloned: 6,
			spoil: func(_ *testing.T, a, _ *member, copies []replica.Copy) {
				a.hsm().Lose(copies[1].ID)
				a.hsm().Lose(copies[4].ID)
			}},
		{name: "the source has another key, gives none of it away and is blamed once", cloned: 6, blamed: "hsm-a",
			spoil: func(_ *testing.T, a, _ *member, copies []replica.Copy) { a.hsm().Corrupt(copies[2].ID) }},
		{name: "the source is lost", cloned: 6,
			source: func(pluginproto.CloneRequest) error { return broken }},
		{name: "the source can do no more than one", cloned: 6,
			source: func(req pluginproto.CloneRequest) error {
				if len(req.Keys) > 1 {
					return muddled
				}
				return nil
			}},
		{name: "the target does not understand a transfer of many", cloned: 6,
			target: func(req pluginproto.CloneRequest) error {
				if len(req.Keys) > 1 && !req.End {
					return muddled
				}
				return nil
			}},
		{name: "the target has another key, which stays as it is", cloned: 5, refused: 1,
			spoil: func(t *testing.T, _, b *member, copies []replica.Copy) {
				b.other(t, copies[3]) // after the token was listed
			}},
	} {
		t.Run(x.name, func(t *testing.T) {
			none := func(pluginproto.CloneRequest) error { return nil }
			a, b, c := newCarrier(t, "hsm-a", 50), newCarrier(t, "hsm-b", 50), newCarrier(t, "hsm-c", 50)
			copies := a.makeMany(t, 6)
			apply(t, c, copies, from(a))
			source, target := &balky{a, none}, &balky{b, none}
			if x.source != nil {
				source.against = x.source
			}
			if x.target != nil {
				target.against = x.target
			}
			s, err := replica.NewSync(t.Context(), target)
			if err != nil {
				t.Fatal(err)
			}
			if x.spoil != nil {
				x.spoil(t, a, b, copies)
			}
			var blamed []string
			sources := from(source, c)
			sources.Wrong = func(source string, _ error) { blamed = append(blamed, source) }
			r, err := s.Apply(t.Context(), replica.Plan{Copies: copies}, sources)
			if err != nil || r.Cloned != x.cloned || len(r.Refused) != x.refused {
				t.Errorf("%d cloned, refused %v, %v; want %d and %d", r.Cloned, r.Refused, err, x.cloned, x.refused)
			}
			if got := strings.Join(blamed, " "); got != x.blamed {
				t.Errorf("blamed %q, want %q", got, x.blamed)
			}
		})
	}
}

// mute is a member whose HSM does not give one key away, which it tells the target and
// nobody else.
type mute struct {
	*member
	about pluginproto.KeyID
}

func (m *mute) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	out, err := m.member.CloneStep(ctx, req)
	if slices.Contains(req.Keys, m.about) && len(out.Blob) > 0 {
		out.Blob[len(out.Blob)-1] ^= 1
	}
	return out, err
}

func TestWhatOneSourceDoesNotGiveComesFromTheNext(t *testing.T) {
	a, b, c := newCarrier(t, "hsm-a", 50), newCarrier(t, "hsm-b", 50), newCarrier(t, "hsm-c", 50)
	copies := a.makeMany(t, 6)
	apply(t, c, copies, from(a))
	first := &mute{a, copies[2].ID}
	if r := apply(t, b, copies, from(first, c)); r.Cloned != 6 || len(r.Refused) != 0 {
		t.Errorf("%d cloned, refused %v", r.Cloned, r.Refused)
	}
	alone := newCarrier(t, "hsm-d", 50)
	if r := apply(t, alone, copies, from(first)); r.Cloned != 5 || len(r.Refused) != 1 || !strings.Contains(r.Refused[0].Err.Error(), "to member hsm-d") {
		t.Errorf("from nobody else: %d cloned, refused %v", r.Cloned, r.Refused)
	}
}

func TestATransferAsksTheMemberThatIsKnownToHoldTheKeys(t *testing.T) {
	a, b, c := newCarrier(t, "hsm-a", 50), newCarrier(t, "hsm-b", 50), newCarrier(t, "hsm-c", 50)
	copies := c.makeMany(t, 20)
	for i := range copies {
		copies[i].Members = []string{"hsm-c"}
	}
	if r := apply(t, b, copies, from(a, c)); r.Cloned != 20 {
		t.Errorf("%d cloned, want 20", r.Cloned)
	}
	if n, asked := c.Calls(memdriver.CallCloneStep), a.Calls(memdriver.CallCloneStep); n != 2 || asked != 0 {
		t.Errorf("%d steps at the holder and %d at the other, want 2 and 0", n, asked)
	}
}

func TestSourcesOfAnotherProtocolArePassedOver(t *testing.T) {
	a := newCarrier(t, "hsm-a", 50)
	copies := a.makeMany(t, 20)
	b := newMemberOf(t, "hsm-b", memdriver.Options{CloneKeys: 50, CloneProtocol: "cpv1"})
	c := newCarrier(t, "hsm-c", 50)
	if r := apply(t, c, copies, from(b, a)); r.Cloned != 20 || len(r.Refused) != 0 {
		t.Errorf("%d cloned, refused %v", r.Cloned, r.Refused)
	}
	if n, asked := a.Calls(memdriver.CallCloneStep), b.Calls(memdriver.CallCloneStep); n != 2 || asked != 0 {
		t.Errorf("%d steps at the one that can, %d at the other; want 2 and 0", n, asked)
	}
	r := apply(t, b, copies, from(a, c))
	if r.Cloned != 0 || len(r.Refused) != 20 {
		t.Fatalf("%d cloned and %d refused where nobody shares a protocol", r.Cloned, len(r.Refused))
	}
	want := "they have no cloning protocol in common: hsm-a gives keys away by memory, hsm-b takes them by cpv1"
	if text := r.Refused[0].Err.Error(); !strings.Contains(text, want) && !strings.Contains(text, "it was not tried") {
		t.Errorf("refused with %q, want %q", text, want)
	}
}

func TestATransferEndsWithTheTarget(t *testing.T) {
	broken := &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "unwrapping"}
	a, b := newCarrier(t, "hsm-a", 50), newCarrier(t, "hsm-b", 50)
	copies := a.makeMany(t, 120)
	s, err := replica.NewSync(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	b.Script(memdriver.Fault{Call: memdriver.CallCloneStep, Err: broken})
	_, err = s.Apply(t.Context(), replica.Plan{Copies: copies}, from(a))
	if !errors.Is(err, broken) || !strings.Contains(err.Error(), "to member hsm-b: unwrapping: CKR_DEVICE_ERROR") {
		t.Errorf("Apply = %v", err)
	}
	if n := a.Calls(memdriver.CallCloneStep); n != 2 { // the offer, and the end of the transfer
		t.Errorf("the source was asked %d times after its partner was lost", n)
	}
}

func TestAFullTokenIsNotAskedForEverInTransfersOfMany(t *testing.T) {
	full := &pluginproto.Error{Class: pluginproto.ClassBusy, CKR: 0x31, Op: "unwrapping"} // CKR_DEVICE_MEMORY
	a, b := newCarrier(t, "hsm-a", 50), newCarrier(t, "hsm-b", 50)
	copies := a.makeMany(t, 500)
	target := &balky{b, func(req pluginproto.CloneRequest) error {
		if req.End {
			return nil
		}
		return full
	}}
	r := apply(t, target, copies, from(a))
	if r.Cloned != 0 || len(r.Refused) != 500 {
		t.Errorf("%d cloned and %d refused", r.Cloned, len(r.Refused))
	}
	// One transfer of many, then single ones, and the rest is refused unasked.
	if n := a.Calls(memdriver.CallCloneStep); n > 2*(1+16+4) {
		t.Errorf("%d steps at the source", n)
	}
	notTried := slices.IndexFunc(r.Refused, func(x replica.Refusal) bool { return strings.Contains(x.Err.Error(), "it was not tried") })
	if notTried < 0 {
		t.Error("no refusal says that it was not tried")
	}
}

func TestTheEndOfTheContextEndsTransfers(t *testing.T) {
	a, b := newCarrier(t, "hsm-a", 50), newCarrier(t, "hsm-b", 50)
	copies := a.makeMany(t, 120)
	ctx, cancel := context.WithCancel(t.Context())
	target := &balky{b, func(req pluginproto.CloneRequest) error {
		cancel()
		return ctx.Err()
	}}
	s, err := replica.NewSync(ctx, target)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Apply(ctx, replica.Plan{Copies: copies}, from(a)); !errors.Is(err, context.Canceled) {
		t.Errorf("Apply = %v, want the end of the context", err)
	}
	if n := len(b.hsm().Keys()); n != 0 {
		t.Errorf("%d keys came", n)
	}
}

// late is a member to which something happens when a transfer has come to its end there, before
// anybody hears of it.
type late struct {
	*member
	happens func(pluginproto.CloneRequest) error
}

func (l *late) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	out, err := l.member.CloneStep(ctx, req)
	if err == nil && out.Done && !req.End {
		err = l.happens(req)
	}
	return out, err
}

// Whoever destroys a key while a copy of it is on its way does not find it on the member.
func TestAKeyThatIsDestroyedOnItsWayDoesNotStay(t *testing.T) {
	for _, keys := range []int{50, 1} {
		for _, x := range []struct {
			name   string
			answer error
			ends   bool // the context, in the same moment
		}{
			{name: "the member says that it has come"},
			{name: "the answer is lost", answer: pluginproto.Errorf(pluginproto.ClassUnknown, "cloning", "no answer")},
			{name: "the member is lost", answer: &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRDeviceError, Op: "cloning"}},
			{name: "nobody waits any more", ends: true},
		} {
			t.Run(fmt.Sprintf("%s, %d in a transfer", x.name, keys), func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				a, b := newCarrier(t, "hsm-a", keys), newCarrier(t, "hsm-b", keys)
				copies := a.makeMany(t, 4)
				doomed := copies[2]
				var gone atomic.Bool
				to := &late{b, func(req pluginproto.CloneRequest) error {
					if !slices.Contains(req.Keys, doomed.ID) || gone.Swap(true) {
						return nil
					}
					if x.ends {
						cancel()
						return context.Canceled
					}
					return x.answer
				}}
				s, err := replica.NewSync(t.Context(), to)
				if err != nil {
					t.Fatal(err)
				}
				sources := from(a)
				sources.Gone = func(c replica.Copy) bool { return gone.Load() && c.ID == doomed.ID }
				_, err = s.Apply(ctx, replica.Plan{Copies: copies}, sources)
				if lost := x.answer != nil && pluginproto.ClassOf(x.answer) == pluginproto.ClassMember; (err != nil) != (lost || x.ends) {
					t.Errorf("Apply = %v", err)
				}
				if !gone.Load() || s.Holds(doomed) {
					t.Errorf("the key was destroyed: %v, and is held: %v", gone.Load(), s.Holds(doomed))
				}
				if _, err := b.Inspect(t.Context(), doomed.ID); pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
					t.Errorf("the destroyed key is on the member: %v", err)
				}
			})
		}
	}
}

// heedless is a member that does what was begun, whatever becomes of its caller.
type heedless struct {
	*member
	happens func()
}

func (h *heedless) CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	h.happens()
	return h.member.CloneStep(context.WithoutCancel(ctx), req)
}

func TestTheEndOfTheContextBetweenTwoKeysIsNoSuccess(t *testing.T) {
	for _, keys := range []int{50, 1} {
		t.Run(fmt.Sprintf("%d in a transfer", keys), func(t *testing.T) {
			a, b := newCarrier(t, "hsm-a", keys), newCarrier(t, "hsm-b", keys)
			copies := a.makeMany(t, 120)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			target := &heedless{b, cancel}
			s, err := replica.NewSync(ctx, target)
			if err != nil {
				t.Fatal(err)
			}
			r, err := s.Apply(ctx, replica.Plan{Copies: copies}, from(&heedless{a, func() {}}))
			if !errors.Is(err, context.Canceled) {
				t.Errorf("Apply = %d held, %d missing, %v, want the end of the context", len(r.Held), len(r.Missing), err)
			}
		})
	}
}
