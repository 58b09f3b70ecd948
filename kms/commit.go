package kms

import (
	"context"
	"errors"
	"slices"

	"kmsd/kms/catalog"
	"kmsd/pluginproto"
)

// commit writes the version into the catalog. From here on the caller's end does
// not matter: the version is on enough members, and only the outcome is open.
func (k *KMS) commit(ctx context.Context, g *keyGroup, h half, copies []string, done string, base func() (catalog.Key, error)) (catalog.Key, error) {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	for {
		rec, err := base()
		if err != nil { // disabled or destroyed meanwhile
			k.undo(ctx, g, h.intent)
			return catalog.Key{}, err
		}
		rec = cloneRecord(rec)
		rec.Versions = append(rec.Versions, catalog.Version{
			Number: h.copy.Version, Identity: h.intent.Identity, State: catalog.Enabled, Created: now(),
			CheckValue: h.copy.CheckValue, Public: h.public, Copies: copies,
		})
		committed, err := k.catalog.Commit(ctx, rec, h.intent)
		switch {
		case err == nil:
			err = k.ring.put(committed)
		case errors.Is(err, catalog.ErrConflict) && k.changed(ctx, rec):
			continue // somebody disabled or updated the key; add the version to that
		default:
			committed, err = k.decide(ctx, g, h.intent, err)
		}
		if err != nil {
			return catalog.Key{}, err
		}
		k.tell(committed, done, "version", h.copy.Version, "copies", copies) // now that everybody finds it
		g.janitor.wake()                                                     // for members that could not take it
		return committed, nil
	}
}

// changed reports whether the catalog has a newer record than rec was made from.
func (k *KMS) changed(ctx context.Context, rec catalog.Key) bool {
	current, err := k.refresh(ctx, rec.Name)
	return err == nil && current.Rev > rec.Rev
}

// decide finds out how a commit that returned an error has ended.
func (k *KMS) decide(ctx context.Context, g *keyGroup, in catalog.Intent, failure error) (catalog.Key, error) {
	tomb, err := k.catalog.Abandon(ctx, in, g.Names())
	switch {
	case err == nil:
		k.destroyUndone(ctx, g, tomb)
		return catalog.Key{}, failure
	case errors.Is(err, catalog.ErrConflict):
		if rec, err := k.refresh(ctx, in.Key); err == nil && hasIdentity(rec, in.Identity) {
			return rec, nil
		}
	}
	g.janitor.suspect(in.Key)
	return catalog.Key{}, failure
}

// undo takes back a version that is not committed: first in the catalog, so that
// it is certain, then on the members.
func (k *KMS) undo(ctx context.Context, g *keyGroup, in catalog.Intent) {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	tomb, err := k.catalog.Abandon(ctx, in, g.Names())
	if err != nil {
		k.log.Warn("a half-made version is still to be taken back", "key", in.Key, "version", in.Version, "error", err)
		g.janitor.suspect(in.Key)
		return
	}
	k.destroyUndone(ctx, g, tomb)
}

func (k *KMS) destroyUndone(ctx context.Context, g *keyGroup, tomb catalog.Tombstone) {
	id, err := pluginproto.ParseKeyID(tomb.Identity)
	if err == nil {
		err = k.destroyCopies(ctx, g, []pluginproto.KeyID{id})
	}
	if err != nil {
		g.janitor.settleLater()
	}
}

// refresh reads a key anew from the catalog.
func (k *KMS) refresh(ctx context.Context, name string) (catalog.Key, error) {
	rec, err := k.catalog.Key(ctx, name)
	if err != nil {
		return catalog.Key{}, err
	}
	return rec, k.ring.put(rec)
}

func hasIdentity(rec catalog.Key, identity string) bool {
	return slices.ContainsFunc(rec.Versions, func(v catalog.Version) bool { return v.Identity == identity })
}
