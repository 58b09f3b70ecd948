// Package replica answers: does each member hold what it should?
//
// A [Copy] is a key that every member of a group should hold, with the check value
// that each copy of it must have. [Clone] relays one copy from member to member
// without ever seeing the key. [Sync] brings one member in step with a [Plan], and
// [Admission] decides when a member that comes back may be admitted.
//
// One rule makes all of it safe: a copy is as good as its check value. A copy is
// taken from any connected member whose own HSM says it has the right one, in step
// or not, and it is checked again by the HSM that has received it. A key with
// another value under a known identity is never overwritten and never served: its
// member stays out and says why.
package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"kmsd/pluginproto"
)

// Token is a member as this package needs it.
type Token interface {
	Name() string
	List(ctx context.Context) ([]pluginproto.Object, error)
	Destroy(ctx context.Context, id pluginproto.KeyID) error
	CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error)
}

// Copy is a key that a member should hold.
type Copy struct {
	ID         pluginproto.KeyID
	Type       pluginproto.KeyType
	CheckValue []byte

	Key     string // the key's name, for messages
	Version int
}

func (c Copy) String() string { return fmt.Sprintf("key %s version %d", c.Key, c.Version) }

// matches tells in words how an object differs from the copy it should be; nil
// when it does not.
func (c Copy) matches(o pluginproto.Object) error {
	switch {
	case o.ID != c.ID:
		return fmt.Errorf("%s: identity is %s, want %s", c, o.ID, c.ID)
	case o.Type != c.Type:
		return fmt.Errorf("%s: type is %s, want %s", c, o.Type, c.Type)
	case !bytes.Equal(o.CheckValue, c.CheckValue):
		return fmt.Errorf("%s: check value is %x, want %x", c, o.CheckValue, c.CheckValue)
	default:
		return nil
	}
}

// Plan is what a member should hold, at one moment.
type Plan struct {
	// Copies are the keys that every member should hold.
	Copies []Copy
	// Gone are the identities that are destroyed for ever, or never came to be.
	Gone map[pluginproto.KeyID]bool
	// Open are the identities that are being made just now: not wanted yet, and
	// not foreign either.
	Open map[pluginproto.KeyID]bool
}

// Report is what a member holds of a plan.
type Report struct {
	Held      []Copy              // all that it holds now
	Cloned    int                 // how many of them had to be copied to it
	Missing   []Copy              // what it lacks and nobody connected can supply
	Destroyed []pluginproto.KeyID // gone identities that were still on it
	Foreign   int                 // keys that nobody here knows; they are left alone
}

// ErrDifferent is in the error for a key that has another value than its check
// value says.
var ErrDifferent = errors.New("the key has another value than the catalog says")

// different makes the permanent failure of a member with wrong copies.
func different(member string, faults []error) error {
	const shown = 3
	var names []string
	for _, f := range faults[:min(shown, len(faults))] {
		names = append(names, f.Error())
	}
	if more := len(faults) - shown; more > 0 {
		names = append(names, fmt.Sprintf("and %d more", more))
	}
	return fmt.Errorf("%w: %w", ErrDifferent, &pluginproto.Error{
		Class: pluginproto.ClassMember,
		Op:    "comparing member " + member + " with the catalog",
		Msg: strings.Join(names, "; ") +
			"; it is not overwritten: find out which is right, then remove the wrong object or replace the member",
		Permanent: true,
	})
}
