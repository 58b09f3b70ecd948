package catalog

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"time"
)

// Catalog gives the records of a Store their meaning. It holds no state of its
// own, so any number of them may share a Store, and every method may be called
// concurrently.
//
// A value that is passed in carries the Rev it was read at, and the value that
// comes back carries the new one. ErrConflict says that somebody else was faster.
type Catalog struct {
	store Store
}

// New returns the catalog on top of s. The caller closes s.
func New(s Store) *Catalog { return &Catalog{store: s} }

// Key returns the key of that name, or ErrNotFound.
func (c *Catalog) Key(ctx context.Context, name string) (Key, error) {
	r, err := c.store.Get(ctx, KindKey, name)
	if err != nil {
		return Key{}, fmt.Errorf("reading key %q: %w", name, err)
	}
	return decodeKey(r)
}

// Keys yields up to limit keys, 0 for all, whose name starts with prefix and is greater
// than after, by name, as they were at one moment. It ends with the first error.
func (c *Catalog) Keys(ctx context.Context, prefix, after string, limit int) iter.Seq2[Key, error] {
	return decoded(c.store.List(ctx, KindKey, prefix, after, limit), decodeKey)
}

// Intents yields every open intent, as they were at one moment. It ends with the
// first error.
func (c *Catalog) Intents(ctx context.Context) iter.Seq2[Intent, error] {
	return decoded(c.store.List(ctx, KindIntent, "", "", 0), decodeIntent)
}

// Tombstone returns the tombstone of an identity, or ErrNotFound.
func (c *Catalog) Tombstone(ctx context.Context, identity string) (Tombstone, error) {
	r, err := c.store.Get(ctx, KindTombstone, identity)
	if err != nil {
		return Tombstone{}, fmt.Errorf("reading the tombstone of %q: %w", identity, err)
	}
	return decodeTombstone(r)
}

// Tombstones yields every tombstone, settled or not, as they were at one moment.
// It ends with the first error.
func (c *Catalog) Tombstones(ctx context.Context) iter.Seq2[Tombstone, error] {
	return decoded(c.store.List(ctx, KindTombstone, "", "", 0), decodeTombstone)
}

// Begin records that a version is about to be made, before any member is asked.
// keyRev is the Rev of the key as the caller knows it, 0 for a key that does not
// exist yet. ErrConflict: the key is not at keyRev, or somebody else is making the
// same version.
func (c *Catalog) Begin(ctx context.Context, in Intent, keyRev uint64) (Intent, error) {
	r, err := encodeIntent(in)
	if err != nil {
		return Intent{}, err
	}
	rev, err := c.store.Apply(ctx, r, Record{Kind: KindKey, ID: in.Key, Rev: keyRev, Keep: true})
	if err != nil {
		return Intent{}, fmt.Errorf("beginning version %d of key %q: %w", in.Version, in.Key, err)
	}
	in.Rev = rev
	return in, nil
}

// Commit writes the key, which now has the version of the intent, and removes the
// intent in the same step. After an error other than ErrConflict it is open
// whether that happened; then Abandon decides: its ErrConflict means that the
// intent is gone, so the version is there.
func (c *Catalog) Commit(ctx context.Context, key Key, in Intent) (Key, error) {
	if !slices.ContainsFunc(key.Versions, func(v Version) bool {
		return v.Number == in.Version && v.Identity == in.Identity
	}) || key.Name != in.Key {
		return Key{}, fmt.Errorf("committing version %d of key %q: key %q does not have it", in.Version, in.Key, key.Name)
	}
	r, err := encodeKey(key)
	if err != nil {
		return Key{}, err
	}
	rev, err := c.store.Apply(ctx, r, intentGone(in))
	if err != nil {
		return Key{}, fmt.Errorf("committing version %d of key %q: %w", in.Version, in.Key, err)
	}
	key.Rev = rev
	return key, nil
}

// Abandon removes the intent and writes in the same step a tombstone of its
// identity with the members that may hold it: pending, unless the intent names them
// itself. The caller then destroys it there and calls Settle. ErrConflict: the intent is gone already.
func (c *Catalog) Abandon(ctx context.Context, in Intent, pending []string) (Tombstone, error) {
	t := Tombstone{
		Identity: in.Identity, Group: in.Group, Key: in.Key, Version: in.Version,
		Destroyed: time.Now().UTC(), Pending: slices.Clone(pending),
	}
	if in.Members != nil {
		t.Pending = slices.Clone(in.Members)
	}
	r, err := encodeTombstone(t)
	if err != nil {
		return Tombstone{}, err
	}
	rev, err := c.store.Apply(ctx, intentGone(in), r)
	if err != nil {
		return Tombstone{}, fmt.Errorf("abandoning version %d of key %q: %w", in.Version, in.Key, err)
	}
	t.Rev = rev
	return t, nil
}

// PutKey writes a key if the catalog holds it at key.Rev.
func (c *Catalog) PutKey(ctx context.Context, key Key) (Key, error) {
	keys, err := c.PutKeys(ctx, key)
	if err != nil {
		return Key{}, err
	}
	return keys[0], nil
}

// PutKeys writes all of the keys or, when one of them is not at its Rev, none.
// Give it at most BatchSize at a time.
func (c *Catalog) PutKeys(ctx context.Context, keys ...Key) ([]Key, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	out := slices.Clone(keys)
	changes := make([]Record, len(keys))
	for i, k := range keys {
		r, err := encodeKey(k)
		if err != nil {
			return nil, err
		}
		changes[i] = r
	}
	rev, err := c.store.Apply(ctx, changes...)
	if err != nil {
		return nil, fmt.Errorf("writing %s: %w", describeKeys(keys), err)
	}
	for i := range out {
		out[i].Rev = rev
	}
	return out, nil
}

// UpdateKey reads the key, lets change work on it and writes it, again and again
// while somebody else is faster. change may be called several times, each time
// with a fresh copy; its error ends the update and nothing is written.
func (c *Catalog) UpdateKey(ctx context.Context, name string, change func(*Key) error) (Key, error) {
	for {
		k, err := c.Key(ctx, name)
		if err != nil {
			return Key{}, err
		}
		if err := change(&k); err != nil {
			return Key{}, err
		}
		k, err = c.PutKey(ctx, k)
		if !errors.Is(err, ErrConflict) {
			return k, err
		}
		if err := ctx.Err(); err != nil {
			return Key{}, fmt.Errorf("updating key %q: %w", name, err)
		}
	}
}

// Entomb writes a key some of whose versions have become Destroyed, and a new
// tombstone for each of them, in one step. Only then may a member be told to
// destroy them.
func (c *Catalog) Entomb(ctx context.Context, key Key, tombs []Tombstone) (Key, []Tombstone, error) {
	r, err := encodeKey(key)
	if err != nil {
		return Key{}, nil, err
	}
	changes := []Record{r}
	for _, t := range tombs {
		r, err := encodeTombstone(t)
		if err != nil {
			return Key{}, nil, err
		}
		changes = append(changes, r)
	}
	rev, err := c.store.Apply(ctx, changes...)
	if err != nil {
		return Key{}, nil, fmt.Errorf("destroying %d versions of key %q: %w", len(tombs), key.Name, err)
	}
	key.Rev, tombs = rev, slices.Clone(tombs)
	for i := range tombs {
		tombs[i].Rev = rev
	}
	return key, tombs, nil
}

// Settle records that each of the members is known not to hold any of the
// identities: it takes them off the tombstones' Pending. Members may settle at
// the same time; what is settled already stays so.
func (c *Catalog) Settle(ctx context.Context, members []string, identities ...string) error {
	for batch := range slices.Chunk(identities, BatchSize) {
		for {
			err := c.settleOnce(ctx, members, batch)
			if err == nil {
				break
			}
			if !errors.Is(err, ErrConflict) || ctx.Err() != nil {
				return fmt.Errorf("settling tombstones for %v: %w", members, err)
			}
		}
	}
	return nil
}

func (c *Catalog) settleOnce(ctx context.Context, members, identities []string) error {
	var changes []Record
	seen := make(map[string]bool, len(identities)) // :: identity → it is among changes or needs none
	for _, id := range identities {
		if seen[id] {
			continue
		}
		seen[id] = true
		t, err := c.Tombstone(ctx, id)
		if errors.Is(err, ErrNotFound) {
			continue // a canary's, which is gone when it is settled
		}
		if err != nil {
			return err
		}
		before := len(t.Pending)
		t.Pending = slices.DeleteFunc(t.Pending, func(m string) bool { return slices.Contains(members, m) })
		if len(t.Pending) == before {
			continue
		}
		r, err := encodeTombstone(t)
		if err != nil {
			return err
		}
		if t.IsCanary() && len(t.Pending) == 0 {
			r.Value = nil
		}
		changes = append(changes, r)
	}
	if len(changes) == 0 {
		return nil
	}
	_, err := c.store.Apply(ctx, changes...)
	return err
}

// decoded turns records into values, up to the first error.
func decoded[T any](records iter.Seq2[Record, error], decode func(Record) (T, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for r, err := range records {
			var v T
			if err == nil {
				v, err = decode(r)
			}
			if !yield(v, err) || err != nil {
				return
			}
		}
	}
}

func intentGone(in Intent) Record {
	return Record{Kind: KindIntent, ID: intentID(in), Rev: in.Rev}
}

// intentID joins with a slash, which no key name has.
func intentID(in Intent) string { return in.Key + "/" + strconv.Itoa(in.Version) }

func describeKeys(keys []Key) string {
	if len(keys) == 1 {
		return fmt.Sprintf("key %q", keys[0].Name)
	}
	return fmt.Sprintf("%d keys from %q to %q", len(keys), keys[0].Name, keys[len(keys)-1].Name)
}
