package catalog

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// IntentCanary: a key is being made for the length of a test, and destroyed again.
// It is undone as IntentCreate is, but nothing of it is remembered after that.
const IntentCanary IntentOp = "canary"

// canaryKey begins what stands for the name of a key in the records of a canary. No
// key has a name with a space.
const canaryKey = "canary "

// BeginCanary records that a key is about to be made under an identity for a test,
// and on which members it may come to be. Unless the error is ErrConflict, the intent
// that comes with it may be there all the same.
func (c *Catalog) BeginCanary(ctx context.Context, group, identity string, members ...string) (Intent, error) {
	in := Intent{
		Identity: identity, Op: IntentCanary, Group: group, Key: canaryKey + identity, Version: 1,
		Started: time.Now().UTC(), Members: members,
	}
	begun, err := c.Begin(ctx, in, 0)
	if err != nil {
		return in, err
	}
	return begun, nil
}

// EndCanary removes the intent of a canary that no member holds any more.
// ErrConflict: the intent is gone already.
func (c *Catalog) EndCanary(ctx context.Context, in Intent) error {
	if in.Op != IntentCanary {
		return fmt.Errorf("ending the canary %q: it is none", in.Identity)
	}
	if _, err := c.store.Apply(ctx, intentGone(in)); err != nil {
		return fmt.Errorf("ending the canary %q: %w", in.Identity, err)
	}
	return nil
}

// IsCanary reports whether a tombstone is that of a canary. It goes when it is
// settled: the identity was never anybody's, so nobody can bring it back.
func (t Tombstone) IsCanary() bool { return strings.HasPrefix(t.Key, canaryKey) }
