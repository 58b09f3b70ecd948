package replica

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"kmsd/pluginproto"
)

const (
	// maxSteps ends a relay that never comes to an end. Key wrapping needs 2 steps
	// and the longest Luna protocol fewer than 8.
	maxSteps = 16
	// maxBlob is more than any wrapped key or certificate chain needs, in bytes.
	maxBlob = 1 << 20
)

// SourceError says that a clone failed at the member that should have supplied
// the copy; the member that should have received it is not to blame. It hides the
// class of the failure, which speaks of the other member; see Err for it.
type SourceError struct {
	Member string
	Err    error
}

func (e *SourceError) Error() string {
	return fmt.Sprintf("cloning from member %s: %v", e.Member, e.Err)
}

// Arrival is what has become of one copy of a transfer.
type Arrival struct {
	Object pluginproto.Object // as the target's HSM describes it; what it has instead with ErrDifferent
	Err    error
}

// Clone copies a key from one member to another by relaying what their HSMs have
// to say to each other, and returns the key as the target's HSM describes it. The
// target already holding the key makes it a success. A source whose own copy is
// another key gives nothing away. An error of the source is a [*SourceError]; every
// other error is the target's.
func Clone(ctx context.Context, from, to Token, want Copy) (pluginproto.Object, error) {
	got := CloneTogether(ctx, from, to, []Copy{want})[0]
	return got.Object, got.Err
}

// Together returns how many keys one transfer from one member to the other carries, 0 when
// they have no protocol in common.
func Together(from, to Token) int {
	p, _ := pluginproto.CommonProtocol(from.Token().Cloning, to.Token().Cloning)
	return p.Keys
}

// CloneTogether is Clone for copies that go in one transfer, at most [Together] of them.
// What is wrong with one of them does not keep the others from arriving.
func CloneTogether(ctx context.Context, from, to Token, wants []Copy) []Arrival {
	p, ok := pluginproto.CommonProtocol(from.Token().Cloning, to.Token().Cloning)
	if !ok {
		return failAll(len(wants), &SourceError{Member: from.Name(), Err: NoCommonProtocol(from, to)})
	}
	t := &transfer{from: from, to: to, protocol: p.Name, wants: wants, arrivals: make([]Arrival, len(wants))}
	t.run(ctx)
	t.end(ctx)
	again := t.remaining()
	if len(again) == 0 {
		return t.arrivals
	}
	// Some cannot come from this source: the rest goes in a transfer of its own.
	rest := make([]Copy, len(again))
	for i, at := range again {
		rest[i] = wants[at]
	}
	for i, got := range CloneTogether(ctx, from, to, rest) {
		t.arrivals[again[i]] = got
	}
	return t.arrivals
}

func failAll(n int, err error) []Arrival {
	all := make([]Arrival, n)
	for i := range all {
		all[i].Err = err
	}
	return all
}

// NoCommonProtocol says why keys cannot go from one member to another.
func NoCommonProtocol(from, to Token) error {
	names := func(all []pluginproto.CloneProtocol, may func(pluginproto.CloneProtocol) bool) string {
		var out []string
		for _, p := range all {
			if may(p) {
				out = append(out, p.Name)
			}
		}
		if len(out) == 0 {
			return "none"
		}
		return strings.Join(out, ", ")
	}
	return pluginproto.Errorf(pluginproto.ClassCaller, fmt.Sprintf("cloning keys from member %s to member %s", from.Name(), to.Name()),
		"they have no cloning protocol in common: %s gives keys away by %s, %s takes them by %s", from.Name(),
		names(from.Token().Cloning, func(p pluginproto.CloneProtocol) bool { return p.Gives }), to.Name(),
		names(to.Token().Cloning, func(p pluginproto.CloneProtocol) bool { return p.Takes }))
}

// transfer is one relay.
type transfer struct {
	from, to Token
	protocol string
	wants    []Copy
	arrivals []Arrival
	again    bool // the source has something to say against some, and nothing was sent

	source, target             pluginproto.CloneRequest
	openAtSource, openAtTarget bool // it has begun there, and is not done
}

func (t *transfer) run(ctx context.Context) {
	t.source = pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: t.protocol}
	if _, err := rand.Read(t.source.Transfer[:]); err != nil {
		t.fail(fmt.Errorf("drawing a transfer number: %w", err))
		return
	}
	for _, want := range t.wants {
		t.source.Keys = append(t.source.Keys, want.ID)
	}
	t.target = t.source
	t.target.Role = pluginproto.CloneTarget

	for step := range maxSteps {
		t.source.Step, t.target.Step = step, step
		t.openAtSource = true
		said, err := t.from.CloneStep(ctx, t.source)
		if err == nil {
			t.openAtSource = !said.Done
			err = checkBlob(said.Blob)
		}
		if err != nil {
			t.fail(&SourceError{Member: t.from.Name(), Err: err})
			return
		}
		if step == 0 && !t.sourceHas(said.Keys) {
			return
		}
		t.target.Blob = said.Blob
		t.openAtTarget = true
		answer, err := t.to.CloneStep(ctx, t.target)
		if err == nil {
			t.openAtTarget = !answer.Done
			err = checkBlob(answer.Blob)
		}
		if err != nil {
			t.failAtTarget(err)
			return
		}
		if answer.Done {
			t.arrived(answer.Keys)
			return
		}
		if said.Done {
			break // the source has nothing more to say, and the target is not content
		}
		t.source.Blob = answer.Blob
	}
	t.fail(pluginproto.Errorf(pluginproto.ClassUnknown,
		fmt.Sprintf("cloning %s from %s to %s", t.wants[0], t.from.Name(), t.to.Name()),
		"the two drivers came to no end"))
}

// end has an end let go of the transfer that has begun it and not said that it is done.
// What it answers changes nothing; when there is no time left, it finds out by itself that
// nobody goes on.
func (t *transfer) end(ctx context.Context) {
	for _, x := range []struct {
		token Token
		req   pluginproto.CloneRequest
		open  bool
	}{{t.from, t.source, t.openAtSource}, {t.to, t.target, t.openAtTarget}} {
		if x.open && ctx.Err() == nil {
			x.req.Step, x.req.Blob, x.req.End = 0, nil, true
			_, _ = x.token.CloneStep(ctx, x.req)
		}
	}
}

func (t *transfer) fail(err error) { copy(t.arrivals, failAll(len(t.wants), err)) }

func (t *transfer) failAtTarget(err error) {
	for i, want := range t.wants {
		t.arrivals[i].Err = fmt.Errorf("cloning %s to member %s: %w", want, t.to.Name(), err)
	}
}

// sourceHas makes sure that the source has all the right copies, before any of them goes
// to the target.
func (t *transfer) sourceHas(keys []pluginproto.CloneResult) bool {
	bad := 0
	for i, want := range t.wants {
		err := error(nil)
		switch {
		case len(keys) != len(t.wants):
			err = checkSource(t.from, want, nil)
		case keys[i].Err != nil:
			err = keys[i].Err
		default:
			err = checkSource(t.from, want, keys[i].Object)
		}
		if err != nil {
			t.arrivals[i].Err = &SourceError{Member: t.from.Name(), Err: err}
			bad++
		}
	}
	t.again = bad > 0
	return bad == 0
}

// remaining are those that were not sent because of others.
func (t *transfer) remaining() (at []int) {
	if !t.again {
		return nil
	}
	for i, a := range t.arrivals {
		if a.Err == nil {
			at = append(at, i)
		}
	}
	return at
}

// arrived checks what the target says it has now.
func (t *transfer) arrived(keys []pluginproto.CloneResult) {
	for i, want := range t.wants {
		a := &t.arrivals[i]
		switch {
		case len(keys) != len(t.wants):
			a.Object, a.Err = arrived(t.to, want, nil)
		case keys[i].Err != nil:
			a.Err = fmt.Errorf("cloning %s to member %s: %w", want, t.to.Name(), keys[i].Err)
		default:
			a.Object, a.Err = arrived(t.to, want, keys[i].Object)
		}
	}
}

// checkSource makes sure that a source has the right copy before any of it goes to
// the target, where it would have to be told from one that was there before.
func checkSource(from Token, want Copy, has *pluginproto.Object) error {
	if has == nil {
		return pluginproto.Errorf(pluginproto.ClassUnknown, fmt.Sprintf("cloning %s", want), "the driver does not say what it gives")
	}
	if err := want.matches(*has); err != nil {
		return different(from.Name(), err)
	}
	return nil
}

// arrived checks what the target says it has now.
func arrived(to Token, want Copy, got *pluginproto.Object) (pluginproto.Object, error) {
	if got == nil {
		return pluginproto.Object{}, pluginproto.Errorf(pluginproto.ClassUnknown,
			fmt.Sprintf("cloning %s to %s", want, to.Name()), "the driver does not say what it has received")
	}
	if err := want.matches(*got); err != nil {
		return *got, different(to.Name(), err)
	}
	return *got, nil
}

func checkBlob(b []byte) error {
	if len(b) > maxBlob {
		return pluginproto.Errorf(pluginproto.ClassUnknown, "cloning", "the driver's message has %d bytes, more than %d", len(b), maxBlob)
	}
	return nil
}

// Fetch clones a copy to a member from the first source that can supply it. It
// answers not found, without an error, when no source holds it. A source whose copy
// is another key counts as one without; wrong is told of it and may be nil. What the
// member refuses from one source it may take from the next, whose HSM may give what the
// first one's does not; only what says nothing of the source ends it.
func Fetch(ctx context.Context, to Token, c Copy, sources []Token, wrong func(source string, err error)) (_ pluginproto.Object, found bool, err error) {
	var refusal error // the member's first
	var failures []error
	for _, from := range sources {
		if from.Name() == to.Name() {
			continue
		}
		object, err := Clone(ctx, from, to, c)
		if err == nil {
			return object, true, nil
		}
		source, atSource := errors.AsType[*SourceError](err)
		switch {
		case !atSource && isOfTarget(err):
			return object, false, err
		case !atSource:
			refusal = cmp.Or(refusal, err)
		case errors.Is(source.Err, ErrDifferent):
			if wrong != nil {
				wrong(source.Member, source.Err)
			}
		case pluginproto.ClassOf(source.Err) != pluginproto.ClassNotFound:
			failures = append(failures, err)
		}
		if ctx.Err() != nil {
			return pluginproto.Object{}, false, ctx.Err()
		}
	}
	if refusal != nil {
		return pluginproto.Object{}, false, refusal
	}
	return pluginproto.Object{}, false, errors.Join(failures...)
}

// isOfTarget reports whether a member would answer the same whoever gives it the key: it is
// lost or full, or holds something else.
func isOfTarget(err error) bool {
	class := pluginproto.ClassOf(err)
	return class == pluginproto.ClassMember || class == pluginproto.ClassBusy || errors.Is(err, ErrDifferent)
}
