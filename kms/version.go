package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// A version that a data key is wrapped under must not go: the database would not open any
// more. Nothing new comes to be under a version while the record of its key stays as it
// is, unless it is the newest enabled one (the catalog sees to both). So a version is
// taken out of use in three steps:
//
//   - No data key may need it ([KMS.useOf]).
//   - The new state is written, if the record is still as it was before the first step.
//   - If it was the newest enabled one, data keys may have come meanwhile: so it is looked
//     once more, and the state is put back when there are.
//
// A crash before the last step leaves a version disabled or waiting for its destruction
// though a data key needs it. Either can be undone, and before a version is destroyed it
// is looked again, see [KMS.entomb].

// ChangeVersion changes the state of one version of a key.
func (k *KMS) ChangeVersion(ctx context.Context, name string, version int, change api.VersionChange) (api.Key, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	rec, err := k.changeVersion(ctx, name, version, change)
	if err != nil {
		return api.Key{}, translate(fmt.Sprintf("changing version %d of key %q", version, name), err)
	}
	return k.keyToAPI(rec), nil
}

func (k *KMS) changeVersion(ctx context.Context, name string, version int, change api.VersionChange) (catalog.Key, error) {
	switch change.Action {
	case api.ActionEnable, api.ActionRestore:
		return k.bringBack(ctx, name, version, change.Action)
	case api.ActionDisable:
		return k.retire(ctx, name, disableVersion(version), "version_disabled")
	case api.ActionDestroy:
		return k.destroyVersions(ctx, name, change.Window, onlyVersion(version), "version_destroy_scheduled")
	default:
		return catalog.Key{}, badRequest("there is no action %q; choose enable, disable, destroy or restore", change.Action)
	}
}

// bringBack makes a version usable again, or as it was before its destruction was
// scheduled. Nobody can be hurt by that.
func (k *KMS) bringBack(ctx context.Context, name string, version int, action api.VersionAction) (catalog.Key, error) {
	rec, err := k.update(ctx, name, func(rec *catalog.Key) error {
		if _, err := k.groupOf(*rec); err != nil {
			return err
		}
		v, err := versionOf(rec, version)
		switch {
		case err != nil:
			return err
		case action == api.ActionEnable && (v.State == catalog.Disabled || v.State == catalog.Enabled):
			v.State = catalog.Enabled
			return nil
		case action == api.ActionRestore && v.State == catalog.DestroyScheduled:
			v.State, v.Before, v.DestroyAt = v.Before, "", nil
			return nil
		case action == api.ActionEnable:
			return versionState(rec.Name, *v)
		default:
			return stateError("", "version %d of key %s is %s, not scheduled for destruction", version, name, inWords(v.State))
		}
	})
	if err != nil {
		return catalog.Key{}, err
	}
	what := "version_enabled"
	if action == api.ActionRestore {
		what = "version_restored"
	}
	k.changedState(rec, what, []int{version})
	return rec, nil
}

// pick changes the state of versions in a record and returns their numbers. A version
// that is in that state already is none of them.
type pick func(*catalog.Key) ([]int, error)

func disableVersion(version int) pick {
	return func(rec *catalog.Key) ([]int, error) {
		v, err := versionOf(rec, version)
		switch {
		case err != nil:
			return nil, err
		case v.State == catalog.Disabled:
			return nil, nil
		case v.State != catalog.Enabled:
			return nil, versionState(rec.Name, *v)
		}
		v.State = catalog.Disabled
		return []int{version}, nil
	}
}

// onlyVersion picks one version that lives.
func onlyVersion(version int) func(*catalog.Key) ([]int, error) {
	return func(rec *catalog.Key) ([]int, error) {
		v, err := versionOf(rec, version)
		if err != nil {
			return nil, err
		}
		if !living(*v) {
			return nil, stateError("", "version %d of key %s is destroyed already", version, rec.Name)
		}
		return []int{version}, nil
	}
}

// everyVersion picks all versions that live.
func everyVersion(rec *catalog.Key) (all []int, err error) {
	for _, v := range rec.Versions {
		if living(v) {
			all = append(all, v.Number)
		}
	}
	if len(all) == 0 {
		return nil, stateError("", "key %s is destroyed already", rec.Name)
	}
	return all, nil
}

// destroyVersions schedules the destruction of versions, or destroys them now when the
// window is zero. A negative window is the default.
func (k *KMS) destroyVersions(ctx context.Context, name string, window time.Duration, which pick, what string) (catalog.Key, error) {
	wait := window
	if window <= 0 {
		wait = defaultWindow // now: what a crash leaves waits, and can be restored
	}
	var picked []int
	rec, err := k.retire(ctx, name, func(rec *catalog.Key) (_ []int, err error) {
		if picked, err = which(rec); err != nil {
			return nil, err
		}
		at := now().Add(wait)
		for _, n := range picked {
			v, _ := versionOf(rec, n)
			if v.State != catalog.DestroyScheduled {
				v.Before = v.State
			}
			v.State, v.DestroyAt = catalog.DestroyScheduled, &at
		}
		return picked, nil
	}, what)
	if err != nil || window != 0 {
		return rec, err
	}
	return detached(ctx, k, func(ctx context.Context) (catalog.Key, error) {
		g, err := k.groupOf(rec)
		if err != nil {
			return catalog.Key{}, err
		}
		return k.destroyNow(ctx, g, name, func(v catalog.Version) bool {
			return v.State == catalog.DestroyScheduled && slices.Contains(picked, v.Number)
		})
	})
}

// retire takes versions out of use, or refuses that when a data key needs one.
func (k *KMS) retire(ctx context.Context, name string, change pick, what string) (catalog.Key, error) {
	if _, err := k.ring.get(name); err != nil {
		return catalog.Key{}, err
	}
	for {
		before, err := k.catalog.Key(ctx, name)
		if err != nil {
			return catalog.Key{}, err
		}
		g, err := k.groupOf(before)
		if err != nil {
			return catalog.Key{}, err
		}
		after := cloneRecord(before)
		picked, err := change(&after)
		if err != nil || len(picked) == 0 {
			return before, err
		}
		if err := k.mustBeUnused(ctx, before, picked); err != nil {
			return catalog.Key{}, err
		}
		after, err = k.catalog.PutKey(ctx, after)
		if errors.Is(err, catalog.ErrConflict) && ctx.Err() == nil {
			continue
		}
		if err != nil {
			g.janitor.suspect(name) // it may be written all the same
			return catalog.Key{}, err
		}
		if err := k.ring.put(after); err != nil {
			return catalog.Key{}, err
		}
		if slices.Contains(picked, before.Newest()) {
			if err := k.mustBeUnused(ctx, after, picked); err != nil {
				return catalog.Key{}, k.putBack(ctx, before, after, picked, err)
			}
		}
		k.changedState(after, what, picked)
		return after, nil
	}
}

// putBack gives versions the states they had before, unless somebody has changed them
// since, and returns why.
func (k *KMS) putBack(ctx context.Context, before, after catalog.Key, picked []int, why error) error {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	_, err := k.update(ctx, before.Name, func(rec *catalog.Key) error {
		for _, n := range picked {
			v, err := versionOf(rec, n)
			if err != nil {
				return err
			}
			was, _ := versionOf(&before, n)
			is, _ := versionOf(&after, n)
			if v.State == is.State && sameTime(v.DestroyAt, is.DestroyAt) {
				v.State, v.Before, v.DestroyAt = was.State, was.Before, was.DestroyAt
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%v; putting back the state of versions %v, which has to be done now: %w", why, picked, err)
	}
	return why
}

// mustBeUnused returns ErrState when a data key is wrapped under one of the versions.
func (k *KMS) mustBeUnused(ctx context.Context, rec catalog.Key, versions []int) error {
	u, used, err := k.useOf(ctx, rec, versions)
	if err != nil || !used {
		return err
	}
	e := api.NewError(api.CodeState, fmt.Sprintf("version %d of key %s wraps version %d of data key %q of database %s",
		u.Master, rec.Name, u.Number, u.ID, u.Database), errNeeded)
	e.Hint = fmt.Sprintf("rekey database %s, then only the newest version is needed; a key as a whole can be disabled, but destroyed only while no database has data keys under it", u.Database)
	return e
}

// useOf returns a version of a data key that is wrapped under one of the versions of a
// key.
func (k *KMS) useOf(ctx context.Context, rec catalog.Key, versions []int) (found catalog.OldVersion, used bool, err error) {
	for _, db := range rec.Databases {
		for v, err := range k.everyDataVersion(ctx, db) {
			if err != nil {
				return found, false, err
			}
			if slices.Contains(versions, v.Master) {
				return v, true, nil
			}
		}
	}
	return found, false, nil
}

// changedState makes known what was done to versions of a key.
func (k *KMS) changedState(rec catalog.Key, what string, versions []int) {
	if g := k.byName[rec.Group]; g != nil {
		g.janitor.wake() // a time may have changed
	}
	k.tell(rec, what, "versions", versions)
}

// versionOf returns a version by its number, to be read or changed.
func versionOf(rec *catalog.Key, number int) (*catalog.Version, error) {
	i := slices.IndexFunc(rec.Versions, func(v catalog.Version) bool { return v.Number == number })
	if i < 0 {
		return nil, api.NewError(api.CodeNotFound, fmt.Sprintf("key %s has no version %d", rec.Name, number), nil)
	}
	return &rec.Versions[i], nil
}

// versionState is ErrState for a version whose state forbids something.
func versionState(name string, v catalog.Version) error {
	return stateError(wayOut(v.State), "version %d of key %s is %s", v.Number, name, inWords(v.State))
}

func sameTime(a, b *time.Time) bool { return a == b || a != nil && b != nil && a.Equal(*b) }
