package replica

import (
	"context"
	"crypto/rand"
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
// target already holding the key makes it a success. An error of the source is a
// [*SourceError]; every other error is the target's.
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

// arrived checks what the target says it has now.
func arrived(to Token, want Copy, got *pluginproto.Object) (pluginproto.Object, error) {
	if got == nil {
		return pluginproto.Object{}, pluginproto.Errorf(pluginproto.ClassUnknown,
			fmt.Sprintf("cloning %s to %s", want, to.Name()), "the driver does not say what it has received")
	}
	if err := want.matches(*got); err != nil {
		return pluginproto.Object{}, different(to.Name(), []error{err})
	}
	return *got, nil
}

func checkBlob(b []byte) error {
	if len(b) > maxBlob {
		return pluginproto.Errorf(pluginproto.ClassUnknown, "cloning", "the driver's message has %d bytes, more than %d", len(b), maxBlob)
	}
	return nil
}
