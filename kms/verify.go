package kms

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"kmsd/kms/internal/group"
	"kmsd/pluginproto"
)

// What a member says of a copy.
const (
	copyOK        = "ok"
	copyMissing   = "missing"
	copyDifferent = "different"
	copyUnknown   = "unknown" // it could not be asked; never taken for missing
)

// Verify asks every member, past all caches, for its copy of every living version.
// A copy that turns out to be missing is brought over in the background; a member
// with a different one is compared anew at once, and that copy is used no more.
func (k *KMS) Verify(ctx context.Context, name string) (Verification, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	key, err := k.ring.get(name)
	if err != nil {
		return Verification{}, err
	}
	g, err := k.groupOf(key.rec)
	if err != nil {
		return Verification{}, err
	}
	members := g.Names()
	found := make([][]Copy, len(members)) // by index in members
	results := g.OnEach(ctx, members, func(ctx context.Context, m group.Member) error {
		i := slices.Index(members, m.Name())
		for v := range key.rec.Versions {
			if living(key.rec.Versions[v]) {
				found[i] = append(found[i], k.inspect(ctx, g, m, key, v))
			}
		}
		return ctx.Err()
	})
	if err := ctx.Err(); err != nil {
		return Verification{}, translate("verifying key "+strconv.Quote(name), err)
	}
	out := Verification{Name: name, OK: true, Copies: []Copy{}}
	for i, member := range members {
		if found[i] == nil { // it was not asked
			found[i] = unknownCopies(key, member, results[member])
		}
		out.Copies = append(out.Copies, found[i]...)
	}
	out.OK = !slices.ContainsFunc(out.Copies, func(c Copy) bool { return c.State != copyOK })
	slices.SortStableFunc(out.Copies, func(a, b Copy) int { return a.Version - b.Version })
	return out, nil
}

// inspect asks one member for its copy of version i.
func (k *KMS) inspect(ctx context.Context, g *keyGroup, m group.Member, key *key, i int) Copy {
	v := key.rec.Versions[i]
	c := Copy{Version: v.Number, Member: m.Name()}
	object, err := m.Inspect(ctx, key.ids[i])
	switch {
	case pluginproto.ClassOf(err) == pluginproto.ClassNotFound && err != nil:
		c.State = copyMissing
		g.janitor.missing(loss{key.rec.Name, v.Number, m.Name()})
	case err != nil:
		c.State, c.Error = copyUnknown, err.Error()
	case object.Type != key.typ || !bytes.Equal(object.CheckValue, v.CheckValue):
		c.State, c.CheckValue = copyDifferent, hex.EncodeToString(object.CheckValue)
	default:
		c.State, c.CheckValue = copyOK, hex.EncodeToString(object.CheckValue)
	}
	if c.State == copyDifferent && !g.admission.Quarantined(m.Name(), key.ids[i]) {
		// What it wraps with that, nobody else could unwrap. It is compared anew, and
		// that copy is not used any more.
		g.Distrust(m.Name(), fmt.Errorf("its copy of key %s version %d is a different one", key.rec.Name, v.Number))
	}
	return c
}

func unknownCopies(key *key, member string, why error) []Copy {
	if why == nil {
		why = errors.New("it was not asked")
	}
	copies := []Copy{}
	for _, v := range key.rec.Versions {
		if living(v) {
			copies = append(copies, Copy{Version: v.Number, Member: member, State: copyUnknown, Error: fmt.Sprint(why)})
		}
	}
	return copies
}
