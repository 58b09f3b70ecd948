package kms

import (
	"context"
	"slices"

	"kmsd/kms/catalog"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// book is a group's part of the catalog, as replica reads and writes it.
type book struct {
	kms *KMS
	g   *keyGroup
}

// Plan is what members of the group should hold now. Under the lease it is exact;
// without it, it may mix two moments, which the last look mends.
func (b *book) Plan(ctx context.Context) (replica.Plan, error) {
	plan := replica.Plan{Gone: make(map[pluginproto.KeyID]bool), Open: make(map[pluginproto.KeyID]bool)}
	for in, err := range b.kms.catalog.Intents(ctx) {
		if err != nil {
			return replica.Plan{}, err
		}
		if id, err := pluginproto.ParseKeyID(in.Identity); err == nil && in.Group == b.g.name {
			plan.Open[id] = true
		}
	}
	b.kms.ring.inGroup(b.g.name, func(k *key) bool {
		for i, v := range k.rec.Versions {
			if living(v) {
				plan.Copies = append(plan.Copies, k.copyOf(i))
			}
		}
		return true
	})
	for t, err := range b.kms.catalog.Tombstones(ctx) {
		if err != nil {
			return replica.Plan{}, err
		}
		if id, err := pluginproto.ParseKeyID(t.Identity); err == nil && t.Group == b.g.name {
			plan.Gone[id] = true
		}
	}
	return plan, nil
}

// Note writes down which copies a member holds, and that it holds nothing that is
// gone.
func (b *book) Note(ctx context.Context, member string, plan replica.Plan, report replica.Report) error {
	var settled []string
	for t, err := range b.kms.catalog.Tombstones(ctx) {
		if err != nil {
			return err
		}
		id, err := pluginproto.ParseKeyID(t.Identity)
		if err == nil && plan.Gone[id] && slices.Contains(t.Pending, member) {
			settled = append(settled, t.Identity)
		}
	}
	if len(settled) > 0 {
		if err := b.kms.catalog.Settle(ctx, []string{member}, settled...); err != nil {
			return err
		}
	}
	moves := make(map[string][]move)
	for _, c := range report.Held {
		moves[c.Key] = append(moves[c.Key], move{c.Version, member, true})
	}
	for _, c := range report.Missing {
		moves[c.Key] = append(moves[c.Key], move{c.Version, member, false})
	}
	return b.kms.noteCopies(ctx, moves)
}

// move is one thing learnt about copies: a member has one, or has not.
type move struct {
	version int
	member  string
	has     bool
}

// noteCopies writes what was learnt about copies, by key name, into the catalog.
// What the catalog says already costs nothing.
func (k *KMS) noteCopies(ctx context.Context, moves map[string][]move) error {
	var batch []catalog.Key
	for name, ms := range moves {
		cached, err := k.ring.get(name)
		if err != nil {
			continue // destroyed keys keep their records, so this key never was committed
		}
		rec := cloneRecord(cached.rec)
		if applyMoves(&rec, ms) {
			batch = append(batch, rec)
		}
	}
	for recs := range slices.Chunk(batch, catalog.BatchSize) {
		written, err := k.catalog.PutKeys(ctx, recs...)
		if err == nil {
			for _, rec := range written {
				err = k.ring.put(rec)
			}
		} else {
			err = k.noteOneByOne(ctx, recs, moves)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// noteOneByOne is for a batch of which some key was changed meanwhile.
func (k *KMS) noteOneByOne(ctx context.Context, recs []catalog.Key, moves map[string][]move) error {
	for _, rec := range recs {
		if _, err := k.update(ctx, rec.Name, func(rec *catalog.Key) error {
			applyMoves(rec, moves[rec.Name])
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// applyMoves changes the copies of a record, and reports whether it had to.
func applyMoves(rec *catalog.Key, moves []move) (changed bool) {
	for _, m := range moves {
		i, ok := slices.BinarySearchFunc(rec.Versions, m.version, func(v catalog.Version, n int) int { return v.Number - n })
		if !ok || !living(rec.Versions[i]) {
			continue
		}
		v := &rec.Versions[i]
		at := slices.Index(v.Copies, m.member)
		switch {
		case m.has && at < 0:
			v.Copies = append(v.Copies, m.member)
			slices.Sort(v.Copies)
			changed = true
		case !m.has && at >= 0:
			v.Copies = slices.Delete(v.Copies, at, at+1)
			changed = true
		}
	}
	return changed
}
