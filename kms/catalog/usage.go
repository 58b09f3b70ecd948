package catalog

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
)

// Usage is the record of how often a version of a master key has wrapped: an upper bound,
// written ahead, because AES-GCM with random IVs is safe for 2^32 calls under one key
// only (NIST SP 800-38D, section 8.3).
type Usage struct {
	Rev uint64 `json:"-"`

	Identity string `json:"identity"` // the record's ID
	Wraps    uint64 `json:"wraps"`
}

// Usages yields what is known of every version that has wrapped. It ends with the first
// error.
func (c *Catalog) Usages(ctx context.Context) iter.Seq2[Usage, error] {
	return decoded(c.store.List(ctx, KindUsage, "", "", 0), decodeUsage)
}

// Usage returns what is known of one version, or ErrNotFound.
func (c *Catalog) Usage(ctx context.Context, identity string) (Usage, error) {
	r, err := c.store.Get(ctx, KindUsage, identity)
	if err != nil {
		return Usage{}, fmt.Errorf("reading the usage of %q: %w", identity, err)
	}
	return decodeUsage(r)
}

// PutUsages writes upper bounds, all of them or, when one is not at its Rev, none. Give it
// at most BatchSize at a time.
func (c *Catalog) PutUsages(ctx context.Context, usages ...Usage) ([]Usage, error) {
	out := slices.Clone(usages)
	changes := make([]Record, len(usages))
	for i, u := range usages {
		r, err := encodeUsage(u)
		if err != nil {
			return nil, err
		}
		changes[i] = r
	}
	rev, err := c.store.Apply(ctx, changes...)
	if err != nil {
		return nil, fmt.Errorf("writing the usage of %d versions: %w", len(usages), err)
	}
	for i := range out {
		out[i].Rev = rev
	}
	return out, nil
}

type usageRecord struct {
	head
	Usage
}

func encodeUsage(u Usage) (Record, error) {
	if err := checkText("identity", u.Identity, maxIdentity); err != nil {
		return Record{}, fmt.Errorf("writing the usage of %q: %w", u.Identity, err)
	}
	return encode(KindUsage, u.Identity, u.Rev, usageRecord{headOf(KindUsage), u})
}

func decodeUsage(r Record) (Usage, error) {
	var v usageRecord
	if err := decode(r, &v); err != nil {
		return Usage{}, err
	}
	if err := errors.Join(checkText("identity", v.Identity, maxIdentity), checkID(r, v.Identity)); err != nil {
		return Usage{}, damaged(r, err)
	}
	v.Usage.Rev = r.Rev
	return v.Usage, nil
}
