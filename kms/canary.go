package kms

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"kmsd/kms/catalog"
	"kmsd/kms/internal/group"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// canaryLabel is what a person with a PKCS#11 browser sees of a canary key.
const canaryLabel = "kmsd canary"

// proveClone proves that a member takes keys from the group: a canary key is made on
// a member in step, cloned to it, compared there and destroyed on both. Without
// another member in step there is nothing to prove. The caller has the lease.
//
// A refusal of the member's is a permanent failure of it, which names the difference.
// A failure of the one that should supply the canary is not held against it: the next
// one does; but when all of them refuse to give it one, it does not fit. Whatever happens,
// a crash included, the canary is destroyed wherever it may have come to be.
func (k *KMS) proveClone(ctx context.Context, g *keyGroup, to group.Member) error {
	var failure, refusal error // of the members that should have supplied it; the first refusal
	refused := true            // there was nothing but refusals
	for _, from := range g.InStep() {
		if from.Name() == to.Name() {
			continue
		}
		err := replica.NoCommonProtocol(from, to)
		if replica.Together(from, to) > 0 {
			err = k.sendCanary(ctx, g, from, to)
			source, atSource := errors.AsType[*replica.SourceError](err)
			if !atSource {
				return refusedCanary(from, to, err)
			}
			k.log.Warn("a member could not supply a canary key", "group", g.name, "member", from.Name(), "error", err)
			refused = refused && refusesToGive(source.Err)
			refusal = cmp.Or(refusal, refusedCanary(from, to, source.Err))
		}
		if failure != nil {
			err = fmt.Errorf("%w; %w", failure, err)
		}
		failure = err
	}
	switch {
	case failure == nil:
		return nil
	case refused && refusal != nil: // they give keys to each other, so it is this one that does not fit
		return refusal
	default:
		return fmt.Errorf("proving that member %s takes keys: no other member could make one: %w", to.Name(), failure)
	}
}

// errUnmade is in the failure of a member that cannot even make a canary key.
var errUnmade = errors.New("making a canary key")

// refusesToGive says whether a member has a canary key and does not give it to another one
// for what that one is.
func refusesToGive(err error) bool {
	return pluginproto.ClassOf(err) == pluginproto.ClassCaller && !errors.Is(err, errUnmade)
}

// sendCanary makes one canary on from and clones it to to.
func (k *KMS) sendCanary(ctx context.Context, g *keyGroup, from, to group.Member) error {
	id, err := newIdentity()
	if err != nil {
		return err
	}
	intent, err := k.catalog.BeginCanary(ctx, g.name, id.String(), from.Name(), to.Name())
	if err != nil {
		g.janitor.suspect(intent.Key) // it may be there all the same
		return err
	}
	defer k.endCanary(ctx, g, intent, id, from, to)

	object, err := from.Generate(ctx, pluginproto.KeySpec{ID: id, Type: pluginproto.AES256, Label: canaryLabel})
	if err == nil {
		err = checkObject(object, id, pluginproto.AES256)
	}
	if err != nil {
		return &replica.SourceError{Member: from.Name(), Err: fmt.Errorf("%w: %w", errUnmade, err)}
	}
	want := replica.Copy{ID: id, Type: object.Type, CheckValue: object.CheckValue, Key: "canary", Version: 1}
	if _, err := replica.Clone(ctx, from, to, want); err != nil {
		return err
	}
	there, err := to.Inspect(ctx, id) // past what it has just said
	if err == nil && !bytes.Equal(there.CheckValue, object.CheckValue) {
		err = fmt.Errorf("%w: the canary's check value is %x, want %x", replica.ErrDifferent, there.CheckValue, object.CheckValue)
	}
	return err
}

// endCanary destroys a canary and forgets it. Where that is not possible now, it is
// done before the member serves again.
func (k *KMS) endCanary(ctx context.Context, g *keyGroup, in catalog.Intent, id pluginproto.KeyID, holders ...group.Member) {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	var gone []string
	for _, m := range holders {
		if err := m.Destroy(ctx, id); err == nil || pluginproto.ClassOf(err) == pluginproto.ClassNotFound {
			gone = append(gone, m.Name())
		}
	}
	var err error
	if len(gone) == len(holders) {
		err = k.catalog.EndCanary(ctx, in)
	} else if _, err = k.catalog.Abandon(ctx, in, nil); err == nil {
		err = k.catalog.Settle(ctx, gone, in.Identity)
		g.janitor.settleLater()
	}
	if err != nil {
		k.log.Warn("a canary key is still to be taken back", "group", g.name, "identity", in.Identity, "error", err)
		g.janitor.suspect(in.Key)
	}
}

// refusedCanary makes of a canary that did not arrive what an operator can act on. What
// may be over in a moment stays as it is.
func refusedCanary(from, to group.Member, err error) error {
	if err == nil {
		return nil
	}
	op := fmt.Sprintf("proving that member %s takes keys from member %s", to.Name(), from.Name())
	driver, _ := errors.AsType[*pluginproto.Error](err)
	switch {
	case !bytes.Equal(from.Token().DomainCheck, to.Token().DomainCheck):
		return &pluginproto.Error{Class: pluginproto.ClassMember, Op: op, Permanent: true,
			Msg: "its domain is another one: give both the same domain secret"}
	case errors.Is(err, replica.ErrDifferent):
		return &pluginproto.Error{Class: pluginproto.ClassMember, Op: op, Permanent: true,
			Msg: fmt.Sprintf("what it holds is not what was cloned to it, so its token or its driver is broken (%v)", err)}
	case driver == nil, driver.Class == pluginproto.ClassMember, driver.Class == pluginproto.ClassBusy:
		return fmt.Errorf("%s: %w", op, err)
	case driver.Msg != "": // it knows its HSM better than anybody here
		return &pluginproto.Error{Class: pluginproto.ClassMember, CKR: driver.CKR, Op: op, Permanent: true,
			Msg: driver.Msg + " (it refuses a clone of a canary key)"}
	default:
		return &pluginproto.Error{Class: pluginproto.ClassMember, CKR: driver.CKR, Op: op, Permanent: true,
			Msg: fmt.Sprintf("it refuses a clone of a canary key (%v): its policies must allow that keys are cloned to it, and it needs room for them", err)}
	}
}

// newIdentity draws an identity that no key has had.
func newIdentity() (id pluginproto.KeyID, err error) {
	if _, err := rand.Read(id[:]); err != nil {
		return id, fmt.Errorf("drawing an identity: %w", err)
	}
	return id, nil
}
