package kms

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"strconv"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// dataKeyAAD is what the envelope of a version of a data key is bound to, so that it
// unwraps in its own place only:
//
//	"kmsd data key 1" 0 | length, database | length, ID | version (4 bytes, big endian) | 1 for an object, else 0
//
// A length is one byte. What callers of Wrap bind is theirs to choose, so an envelope of
// theirs may say the same; but it cannot be put into the catalog.
func dataKeyAAD(database, id string, version int, object bool) []byte {
	const domain = "kmsd data key 1\x00"
	aad := make([]byte, 0, len(domain)+len(database)+len(id)+7)
	aad = append(aad, domain...)
	aad = append(append(aad, byte(len(database))), database...)
	aad = append(append(aad, byte(len(id))), id...)
	aad = binary.BigEndian.AppendUint32(aad, uint32(version))
	if object {
		return append(aad, 1)
	}
	return append(aad, 0)
}

// ofDataKey says in errors which data key is meant.
func ofDataKey(database, id string) string {
	return "data key " + strconv.Quote(id) + " of database " + strconv.Quote(database)
}

// NamedKey returns a version of a data key, 0 for the newest. The caller wipes its
// plaintext.
func (k *KMS) NamedKey(ctx context.Context, database, id string, version int) (api.NamedKey, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	named, err := k.namedKey(ctx, database, id, version)
	if err != nil {
		return api.NamedKey{}, translate("reading "+ofDataKey(database, id), err)
	}
	return named, nil
}

func (k *KMS) namedKey(ctx context.Context, database, id string, version int) (api.NamedKey, error) {
	if version < 0 {
		return api.NamedKey{}, badRequest("version %d was asked for, want 1 or more, or 0 for the newest", version)
	}
	dk, v, err := k.readVersion(ctx, database, id, version)
	if err != nil {
		return api.NamedKey{}, err
	}
	for {
		plaintext, failed := k.unwrapDataKey(ctx, dk, v)
		if failed == nil {
			named := namedToAPI(dk, v)
			named.Plaintext = plaintext
			return named, nil
		}
		// A rekey may have moved it since it was read, and retired what it was wrapped under.
		tried := v.Envelope
		dk, v, err = k.readVersion(ctx, database, id, version)
		switch {
		case err != nil && ctx.Err() == nil:
			return api.NamedKey{}, err
		case err != nil, bytes.Equal(v.Envelope, tried):
			return api.NamedKey{}, failed
		}
	}
}

// readVersion returns the records of a data key and of a version of it that is given
// away, 0 for the newest.
func (k *KMS) readVersion(ctx context.Context, database, id string, version int) (catalog.DataKey, catalog.DataVersion, error) {
	dk, err := k.readDataKey(ctx, database, id)
	if err != nil {
		return catalog.DataKey{}, catalog.DataVersion{}, err
	}
	v := dk.DataVersion
	if version != 0 && version != v.Number {
		if v, err = k.readOldVersion(ctx, dk, version); err != nil {
			return catalog.DataKey{}, catalog.DataVersion{}, err
		}
	}
	if v.Deleted != nil {
		return catalog.DataKey{}, catalog.DataVersion{}, deleted(dk, v)
	}
	return dk, v, nil
}

// readDataKey returns the record of a data key. That there is none is certain.
func (k *KMS) readDataKey(ctx context.Context, database, id string) (catalog.DataKey, error) {
	if err := cmp.Or(api.CheckDatabaseName(database), api.CheckNamedKeyID(id)); err != nil {
		return catalog.DataKey{}, err
	}
	dk, err := k.catalog.DataKey(ctx, database, id)
	if !errors.Is(err, catalog.ErrNotFound) {
		return dk, err
	}
	if _, err := k.masterOf(ctx, database); err != nil {
		return catalog.DataKey{}, err
	}
	return catalog.DataKey{}, api.NewError(api.CodeNotFound, fmt.Sprintf("database %q has no data key %q", database, id), nil)
}

// readOldVersion returns a version that is not the newest. A number below the newest is
// there: versions have no gaps and are kept for ever.
func (k *KMS) readOldVersion(ctx context.Context, dk catalog.DataKey, version int) (catalog.DataVersion, error) {
	if version > dk.Number {
		return catalog.DataVersion{}, api.NewError(api.CodeNotFound,
			fmt.Sprintf("%s has no version %d, the newest is %d", ofDataKey(dk.Database, dk.ID), version, dk.Number), nil)
	}
	old, err := k.catalog.OldVersion(ctx, dk.Database, dk.ID, version)
	return old.DataVersion, err
}

func deleted(dk catalog.DataKey, v catalog.DataVersion) error {
	e := api.NewError(api.CodeNotFound, fmt.Sprintf("version %d of %s was deleted at %s",
		v.Number, ofDataKey(dk.Database, dk.ID), v.Deleted.Format("2006-01-02 15:04:05Z07:00")), api.ErrDeleted)
	e.Hint = "earlier versions can be read by their number; putting the data key makes a version after this one"
	return e
}

// unwrapDataKey unwraps a version of a data key. An envelope that does not belong there
// is damage of the catalog, whichever way it differs.
func (k *KMS) unwrapDataKey(ctx context.Context, dk catalog.DataKey, v catalog.DataVersion) ([]byte, error) {
	master, err := k.masterOf(ctx, dk.Database) // after the record was read: it knows every version that was used before
	if err != nil {
		return nil, err
	}
	plaintext, _, err := k.unwrap(ctx, master, v.Envelope, dataKeyAAD(dk.Database, dk.ID, v.Number, v.Object))
	if errors.Is(err, api.ErrWrongKey) || errors.Is(err, api.ErrCorrupt) {
		e := api.NewError(api.CodeCorrupt, fmt.Sprintf("the envelope of version %d of %s does not unwrap with key %s: %v",
			v.Number, ofDataKey(dk.Database, dk.ID), master.rec.Name, err), err)
		e.Hint = "the catalog was altered, or restored from before its master key's last version was made; a backup has this data key"
		return nil, e
	}
	return plaintext, ofHSMs(err)
}

// ofHSMs is for what has become of a command for a data key. All of it was made or kept
// here, so that one which the HSMs refuse is not the fault of whoever asks for the key.
func ofHSMs(err error) error {
	if !errors.Is(err, api.ErrBadRequest) {
		return err
	}
	e := *api.AsError(err)
	e.Code, e.Hint = api.CodeInternal, "the HSMs refuse what they did before; look at their policies"
	return &e
}

// DescribeNamedKey returns the newest version of a data key without its plaintext.
func (k *KMS) DescribeNamedKey(ctx context.Context, database, id string) (api.NamedKey, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	dk, err := k.readDataKey(ctx, database, id)
	if err != nil {
		return api.NamedKey{}, translate("describing "+ofDataKey(database, id), err)
	}
	return namedToAPI(dk, dk.DataVersion), nil
}

// NamedKeys lists the data keys of a database by ID.
func (k *KMS) NamedKeys(ctx context.Context, database string, opts api.ListOptions) (api.NamedKeyPage, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	page, err := k.namedKeys(ctx, database, opts)
	return page, translate("listing the data keys of database "+strconv.Quote(database), err)
}

func (k *KMS) namedKeys(ctx context.Context, database string, opts api.ListOptions) (api.NamedKeyPage, error) {
	limit, err := pageLimit(opts.Limit)
	if err != nil {
		return api.NamedKeyPage{}, err
	}
	after, err := base64.RawURLEncoding.DecodeString(opts.After)
	if err != nil {
		return api.NamedKeyPage{}, badRequest("after is %q, want the next of the page before", opts.After)
	}
	if _, err := k.masterOf(ctx, database); err != nil {
		return api.NamedKeyPage{}, err
	}
	page := api.NamedKeyPage{Keys: []api.NamedKey{}}
	last := ""
	for dk, err := range k.catalog.DataKeys(ctx, database, opts.Prefix, string(after), limit+1) {
		if err != nil {
			return api.NamedKeyPage{}, err
		}
		if len(page.Keys) == limit {
			page.Next = base64.RawURLEncoding.EncodeToString([]byte(last))
			break
		}
		page.Keys, last = append(page.Keys, namedToAPI(dk, dk.DataVersion)), dk.ID
	}
	return page, nil
}

// lookWidth is how many records are looked at together.
const lookWidth = 1000

// everyDataVersion yields every version of every data key of a database, a page in memory at
// a time, up to the first error. The newest come first: one that is replaced meanwhile
// turns up among the older ones.
func (k *KMS) everyDataVersion(ctx context.Context, database string) iter.Seq2[catalog.OldVersion, error] {
	return func(yield func(catalog.OldVersion, error) bool) {
		for last, more := "", true; more; {
			more = false
			for dk, err := range k.catalog.DataKeys(ctx, database, "", last, lookWidth) {
				if !yield(catalog.OldVersion{Database: database, ID: dk.ID, DataVersion: dk.DataVersion}, err) || err != nil {
					return
				}
				last, more = dk.ID, true
			}
		}
		for last, more := (catalog.OldVersion{}), true; more; {
			more = false
			for old, err := range k.catalog.OldVersions(ctx, database, last, lookWidth) {
				if !yield(old, err) || err != nil {
					return
				}
				last, more = old, true
			}
		}
	}
}

// DeleteNamedKey marks the newest version of a data key as deleted. One that is deleted
// already stays so.
func (k *KMS) DeleteNamedKey(ctx context.Context, database, id string) error {
	ctx, cancel := begin(ctx)
	defer cancel()
	return translate("deleting "+ofDataKey(database, id), k.deleteDataKey(ctx, database, id))
}

func (k *KMS) deleteDataKey(ctx context.Context, database, id string) error {
	for {
		dk, err := k.readDataKey(ctx, database, id)
		if err != nil {
			return err
		}
		if k.format(database) == api.FormatMariaDB {
			return stateError("nothing has to be deleted: a key that no table uses any more does no harm",
				"%s is not deleted: MariaDB may need every version of it for ever", ofDataKey(database, id))
		}
		if dk.Deleted != nil {
			return nil
		}
		at := now()
		dk.Deleted = &at
		switch _, err = k.catalog.MarkDataKey(ctx, dk); {
		case err == nil:
			k.log.Debug("data key deleted", "database", database, "data_key", id, "version", dk.Number)
			return nil
		case errors.Is(err, catalog.ErrConflict) && ctx.Err() == nil: // put, or rekeyed
		case k.isDeleted(ctx, dk):
			return nil
		default:
			return ifEnded(ctx, err)
		}
	}
}

// isDeleted finds out how the writing of a mark that returned an error has ended.
func (k *KMS) isDeleted(ctx context.Context, dk catalog.DataKey) bool {
	v, err := k.versionNow(ctx, dk)
	return err == nil && v.Number == dk.Number && v.Deleted != nil
}

// versionNow reads the version that a record has as its newest, wherever that is now, or
// the newest there is when it does not exist. The end of ctx does not end that.
func (k *KMS) versionNow(ctx context.Context, dk catalog.DataKey) (catalog.DataVersion, error) {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	current, err := k.catalog.DataKey(ctx, dk.Database, dk.ID)
	if err != nil || current.Number <= dk.Number {
		return current.DataVersion, err
	}
	old, err := k.catalog.OldVersion(ctx, dk.Database, dk.ID, dk.Number)
	return old.DataVersion, err
}
