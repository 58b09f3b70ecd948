package kms

import (
	"context"
	"errors"
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
// gone, but for what it has refused to destroy. A copy that is quarantined is none.
func (b *book) Note(ctx context.Context, member string, plan replica.Plan, report replica.Report) error {
	kept := make(map[pluginproto.KeyID]bool, len(report.Refused))
	for _, r := range report.Refused {
		kept[r.ID] = true
	}
	var settled []string
	for t, err := range b.kms.catalog.Tombstones(ctx) {
		if err != nil {
			return err
		}
		id, err := pluginproto.ParseKeyID(t.Identity)
		if err == nil && plan.Gone[id] && !kept[id] && slices.Contains(t.Pending, member) {
			settled = append(settled, t.Identity)
		}
	}
	if len(settled) > 0 {
		err := b.kms.catalog.Settle(ctx, []string{member}, settled...)
		switch {
		case errors.Is(err, catalog.ErrFull): // a full disk keeps nobody from unwrapping
			b.kms.log.Warn("what a member has destroyed is still to be written down", "group", b.g.name, "member", member, "error", err)
			b.g.janitor.settleLater()
		case err != nil:
			return err
		}
	}
	return b.kms.noteCopies(ctx, movesOf(member, report))
}

// Learn writes down which copies a member holds when there are many, a few at a time
// and each time under the lease, since whoever makes a version relies on the key's
// record to stay.
func (b *book) Learn(ctx context.Context, member string, report replica.Report) error {
	moves := movesOf(member, report)
	news := b.kms.recordsOf(moves)
	if len(news) <= catalog.BatchSize {
		return nil // Note has time for that
	}
	for recs := range slices.Chunk(news, catalog.BatchSize) {
		release, err := b.g.Lease(ctx)
		if err != nil {
			return err
		}
		err = b.kms.noteBatch(ctx, recs, moves)
		release()
		if err != nil {
			return err
		}
	}
	return nil
}

// movesOf is what a report tells about copies, by key name.
func movesOf(member string, report replica.Report) map[string][]move {
	moves := make(map[string][]move)
	for _, c := range report.Held {
		moves[c.Key] = append(moves[c.Key], move{c.Version, member, true})
	}
	for _, c := range report.Missing {
		moves[c.Key] = append(moves[c.Key], move{c.Version, member, false})
	}
	for _, w := range report.Quarantined {
		moves[w.Key] = append(moves[w.Key], move{w.Version, member, false})
	}
	return moves
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
	for recs := range slices.Chunk(k.recordsOf(moves), catalog.BatchSize) {
		if err := k.noteBatch(ctx, recs, moves); err != nil {
			return err
		}
	}
	return nil
}

// recordsOf returns the records that what was learnt changes, as they should be.
func (k *KMS) recordsOf(moves map[string][]move) (changed []catalog.Key) {
	for name, ms := range moves {
		cached, err := k.ring.get(name)
		if err != nil {
			continue // destroyed keys keep their records, so this key never was committed
		}
		rec := cloneRecord(cached.rec)
		if applyMoves(&rec, ms) {
			changed = append(changed, rec)
		}
	}
	return changed
}

func (k *KMS) noteBatch(ctx context.Context, recs []catalog.Key, moves map[string][]move) error {
	written, err := k.catalog.PutKeys(ctx, recs...)
	if err != nil {
		return k.noteOneByOne(ctx, recs, moves)
	}
	for _, rec := range written {
		if err := k.ring.put(rec); err != nil {
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
