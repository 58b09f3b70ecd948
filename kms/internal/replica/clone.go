package replica

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

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

// Clone copies a key from one member to another by relaying what their HSMs have
// to say to each other, and returns the key as the target's HSM describes it. The
// target already holding the key makes it a success. A source whose own copy is
// another key gives nothing away. An error of the source is a [*SourceError]; every
// other error is the target's.
func Clone(ctx context.Context, from, to Token, want Copy) (pluginproto.Object, error) {
	source := pluginproto.CloneRequest{Role: pluginproto.CloneSource, Key: want.ID}
	if _, err := rand.Read(source.Transfer[:]); err != nil {
		return pluginproto.Object{}, fmt.Errorf("drawing a transfer number: %w", err)
	}
	target := source
	target.Role = pluginproto.CloneTarget

	for step := range maxSteps {
		source.Step, target.Step = step, step
		said, err := from.CloneStep(ctx, source)
		if err == nil {
			err = checkBlob(said.Blob)
		}
		if err == nil && step == 0 {
			err = checkSource(from, want, said.Object)
		}
		if err != nil {
			return pluginproto.Object{}, &SourceError{Member: from.Name(), Err: err}
		}
		target.Blob = said.Blob
		answer, err := to.CloneStep(ctx, target)
		if err == nil {
			err = checkBlob(answer.Blob)
		}
		if err != nil {
			return pluginproto.Object{}, fmt.Errorf("cloning %s to member %s: %w", want, to.Name(), err)
		}
		if answer.Done {
			return arrived(to, want, answer.Object)
		}
		if said.Done {
			break // the source has nothing more to say, and the target is not content
		}
		source.Blob = answer.Blob
	}
	return pluginproto.Object{}, pluginproto.Errorf(pluginproto.ClassUnknown,
		fmt.Sprintf("cloning %s from %s to %s", want, from.Name(), to.Name()),
		"the two drivers came to no end")
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
// is another key counts as one without; wrong is told of it and may be nil.
func Fetch(ctx context.Context, to Token, c Copy, sources []Token, wrong func(source string, err error)) (_ pluginproto.Object, found bool, err error) {
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
		case !atSource:
			return object, false, err
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
	return pluginproto.Object{}, false, errors.Join(failures...)
}
