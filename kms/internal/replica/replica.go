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
// another value under a known identity is quarantined: it is never used, never
// copied and never overwritten, and its member serves all other keys.
package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"kmsd/pluginproto"
)

// Token is a member as this package needs it.
type Token interface {
	Name() string
	Token() pluginproto.TokenInfo
	List(ctx context.Context) ([]pluginproto.Object, error)
	SetAttributes(ctx context.Context, id pluginproto.KeyID, attrs pluginproto.Attributes) error
	Destroy(ctx context.Context, id pluginproto.KeyID) error
	CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error)
}

// Copy is a key that a member should hold.
type Copy struct {
	ID         pluginproto.KeyID
	Type       pluginproto.KeyType
	CheckValue []byte

	Key     string // the key's name
	Version int

	// Members are those that are known to hold it, as far as anybody knows. What a
	// member holds is what its HSM says; this only tells what to expect.
	Members []string
}

func (c Copy) String() string { return fmt.Sprintf("key %s version %d", c.Key, c.Version) }

// Label is what CKA_LABEL should be: the name and version, for a person with a
// PKCS#11 browser.
func (c Copy) Label() string { return fmt.Sprintf("%s/%d", c.Key, c.Version) }

// matches tells in words how an object differs from the copy it should be; nil
// when it does not. The label does not count.
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

// Report is what a member holds of a plan, and what was done to it.
type Report struct {
	Held      []Copy              // all that it holds now, with the right value
	Cloned    int                 // how many of them had to be copied to it
	Changed   int                 // how many of them had another label
	Destroyed []pluginproto.KeyID // gone identities that were still on it

	Missing     []Copy               // what it lacks: nobody connected can supply it, or it was refused
	Refused     []Refusal            // what could not be done to it; only this keeps a member out
	Quarantined []Wrong              // copies with another value; left alone
	Foreign     []pluginproto.Object // keys that nobody here knows; left alone
}

// Wrong is an object that should be a copy and has another value.
type Wrong struct {
	Copy
	Found pluginproto.Object
}

// Refusal is one thing that could not be done, while its member works. Err says
// what it was, to which key, and on which member.
type Refusal struct {
	ID  pluginproto.KeyID
	Err error
}

// ErrDifferent is in the error for a key that has another value than its check
// value says.
var ErrDifferent = errors.New("the key has another value than the catalog says")

func different(member string, fault error) error {
	return fmt.Errorf("comparing the copy of member %s: %w: %w", member, ErrDifferent, fault)
}
