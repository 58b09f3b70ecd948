package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/pluginproto"
)

const (
	// defaultWindow is how long a key waits for its destruction, 30 days.
	defaultWindow = 720 * time.Hour
	defaultPage   = 100 // keys
)

// Key returns a key with all its versions.
func (k *KMS) Key(_ context.Context, name string) (Key, error) {
	key, err := k.ring.get(name)
	if err != nil {
		return Key{}, err
	}
	return k.keyToAPI(key.rec), nil
}

// Keys returns a page of keys by name.
func (k *KMS) Keys(ctx context.Context, opts ListOptions) (KeyPage, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	if opts.Limit == 0 {
		opts.Limit = defaultPage
	}
	if opts.Limit < 0 || opts.Limit > api.MaxPage {
		return KeyPage{}, badRequest("limit is %d, want 1 to %d", opts.Limit, api.MaxPage)
	}
	page := KeyPage{Keys: []Key{}}
	for rec, err := range k.catalog.Keys(ctx, opts.Prefix, opts.After, opts.Limit+1) {
		if err != nil {
			return KeyPage{}, translate("listing keys", err)
		}
		if len(page.Keys) == opts.Limit {
			page.Next = page.Keys[opts.Limit-1].Name
			break
		}
		page.Keys = append(page.Keys, k.keyToAPI(rec))
	}
	return page, nil
}

// UpdateKey changes what up names.
func (k *KMS) UpdateKey(ctx context.Context, name string, up KeyUpdate) (Key, error) {
	return k.modify(ctx, name, "updated", func(rec *catalog.Key) error {
		g, err := k.groupOf(*rec)
		if err != nil {
			return err
		}
		if up.MinCopies != nil {
			if err := checkMinCopies(g, *up.MinCopies); err != nil {
				return err
			}
			rec.MinCopies = *up.MinCopies
		}
		if up.RotationPeriod != nil {
			if err := checkPeriod(*up.RotationPeriod); err != nil {
				return err
			}
			rec.RotationPeriod = time.Duration(*up.RotationPeriod)
		}
		return nil
	})
}

// Disable makes a key unusable until Enable. It needs no HSM.
func (k *KMS) Disable(ctx context.Context, name string) (Key, error) {
	return k.modify(ctx, name, "disabled", func(rec *catalog.Key) error {
		return switchState(rec, catalog.Enabled, catalog.Disabled)
	})
}

// Enable makes a disabled key usable again.
func (k *KMS) Enable(ctx context.Context, name string) (Key, error) {
	return k.modify(ctx, name, "enabled", func(rec *catalog.Key) error {
		return switchState(rec, catalog.Disabled, catalog.Enabled)
	})
}

// switchState moves every version that is in one state to the other. A key that is
// there already is no error, so that a repeated request is none.
func switchState(rec *catalog.Key, from, to catalog.State) error {
	if s := stateOf(*rec); s != from && s != to {
		return stateError(wayOut(s), "key %s is %s", rec.Name, inWords(s))
	}
	for i := range rec.Versions {
		if rec.Versions[i].State == from {
			rec.Versions[i].State = to
		}
	}
	return nil
}

// Destroy schedules the destruction of every version that lives, or destroys them
// now when the window is zero. Doing it again sets the time anew. It is refused while a
// data key needs one of them.
func (k *KMS) Destroy(ctx context.Context, name string, window time.Duration) (Key, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	cached, err := k.ring.get(name)
	if err != nil {
		return Key{}, err
	}
	var rec catalog.Key
	if window == 0 && len(cached.rec.Databases) == 0 {
		rec, err = k.destroyAll(ctx, name)
	} else {
		rec, err = k.destroyVersions(ctx, name, window, everyVersion, "destroy_scheduled")
	}
	if err != nil {
		return Key{}, translate("destroying key "+strconv.Quote(name), err)
	}
	return k.keyToAPI(rec), nil
}

// Restore takes a scheduled destruction back.
func (k *KMS) Restore(ctx context.Context, name string) (Key, error) {
	return k.modify(ctx, name, "restored", func(rec *catalog.Key) error {
		restored := false
		for i := range rec.Versions {
			if v := &rec.Versions[i]; v.State == catalog.DestroyScheduled {
				v.State, v.Before, v.DestroyAt = v.Before, "", nil
				restored = true
			}
		}
		if !restored {
			return stateError("", "key %s is %s, not scheduled for destruction", name, inWords(stateOf(*rec)))
		}
		return nil
	})
}

// modify changes a key's record; what is the event that tells of it.
func (k *KMS) modify(ctx context.Context, name, what string, change func(*catalog.Key) error) (Key, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	rec, err := k.update(ctx, name, func(rec *catalog.Key) error {
		if _, err := k.groupOf(*rec); err != nil {
			return err
		}
		return change(rec)
	})
	if err != nil {
		return Key{}, translate("changing key "+strconv.Quote(name), err)
	}
	k.byName[rec.Group].janitor.wake() // a time may have changed
	k.tell(rec, what)
	return k.keyToAPI(rec), nil
}

// destroyAll destroys every version of a key now, in one step.
func (k *KMS) destroyAll(ctx context.Context, name string) (catalog.Key, error) {
	return detached(ctx, k, func(ctx context.Context) (catalog.Key, error) {
		cached, err := k.ring.get(name)
		if err != nil {
			return catalog.Key{}, err
		}
		g, err := k.groupOf(cached.rec)
		if err != nil {
			return catalog.Key{}, err
		}
		if _, err := everyVersion(&cached.rec); err != nil {
			return catalog.Key{}, err
		}
		return k.destroyNow(ctx, g, name, living)
	})
}

// destroyNow destroys the versions that doomed picks. It is certain when the
// catalog has it; a member that cannot be asked now destroys its copy before it is
// admitted again.
func (k *KMS) destroyNow(ctx context.Context, g *keyGroup, name string, doomed func(catalog.Version) bool) (catalog.Key, error) {
	release, err := g.Lease(ctx)
	if err != nil {
		return catalog.Key{}, err
	}
	defer release()
	rec, ids, err := k.entomb(ctx, g, name, doomed)
	if err != nil || len(ids) == 0 {
		return rec, err
	}
	k.tell(rec, "destroyed", "versions", len(ids))
	ctx, cancel := cleanup(ctx)
	defer cancel()
	if err := k.destroyCopies(ctx, g, ids); err != nil {
		k.log.Warn("a member is yet to destroy its copy", "key", name, "group", g.name, "error", err)
		g.janitor.settleLater()
	}
	return rec, nil
}

// entomb writes in one step that versions are destroyed and where that is to be
// carried out, again while somebody else is faster. It refuses what a data key needs; a
// version that is not enabled gets no new ones, as long as the record stays as it is.
func (k *KMS) entomb(ctx context.Context, g *keyGroup, name string, doomed func(catalog.Version) bool) (catalog.Key, []pluginproto.KeyID, error) {
	for {
		rec, err := k.catalog.Key(ctx, name)
		if err != nil {
			return catalog.Key{}, nil, err
		}
		var numbers []int
		var ids []pluginproto.KeyID
		var tombs []catalog.Tombstone
		at := now()
		for i := range rec.Versions {
			v := &rec.Versions[i]
			if !living(*v) || !doomed(*v) {
				continue
			}
			if v.State == catalog.Enabled && len(rec.Databases) > 0 {
				return catalog.Key{}, nil, fmt.Errorf("key %s has got a database meanwhile: %w", name, catalog.ErrConflict)
			}
			numbers = append(numbers, v.Number)
			id, err := pluginproto.ParseKeyID(v.Identity)
			if err != nil {
				return catalog.Key{}, nil, err
			}
			ids = append(ids, id)
			tombs = append(tombs, catalog.Tombstone{
				Identity: v.Identity, Group: g.name, Key: name, Version: v.Number,
				Destroyed: at, Pending: union(g.Names(), v.Copies),
			})
			v.State, v.Before, v.DestroyAt, v.Copies = catalog.Destroyed, "", &at, nil
		}
		if len(ids) == 0 {
			return rec, nil, nil // restored meanwhile
		}
		if err := k.mustBeUnused(ctx, rec, numbers); err != nil {
			return catalog.Key{}, nil, err
		}
		rec, _, err = k.catalog.Entomb(ctx, rec, tombs)
		if errors.Is(err, catalog.ErrConflict) && ctx.Err() == nil {
			continue
		}
		if err != nil { // it may be written all the same
			g.janitor.settleLater()
			g.janitor.suspect(name)
			return catalog.Key{}, nil, err
		}
		return rec, ids, k.ring.put(rec)
	}
}

func union(a, b []string) []string {
	all := slices.Concat(a, b)
	slices.SortFunc(all, strings.Compare)
	return slices.Compact(all)
}
