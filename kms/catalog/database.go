package catalog

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strconv"
	"strings"
	"time"
)

// Database is the record of a database whose data keys are kept here.
type Database struct {
	Rev uint64 `json:"-"`

	Name    string    `json:"name"`
	Key     string    `json:"key"` // name of its master key, whose record names the database too
	Created time.Time `json:"created"`
	Job     string    `json:"job,omitempty"` // its last rekey
}

// DataVersion is one version of a named data key, wrapped.
type DataVersion struct {
	Number  int       `json:"version"` // from 1, without gaps
	Created time.Time `json:"created"`
	// Object says that the plaintext is a JSON object, as a Vault client stores one, and
	// not the bytes of a key.
	Object   bool       `json:"object,omitempty"`
	Deleted  *time.Time `json:"deleted,omitempty"` // a client has deleted it; it is kept all the same
	Master   int        `json:"master"`            // the version of the database's master key that wraps it
	Envelope []byte     `json:"envelope"`
}

// DataKey is the record of a named data key, with its newest version in it. The others
// have records of their own, because they are rarely read and never change but for a
// rekey.
type DataKey struct {
	Rev uint64 `json:"-"`

	Database string    `json:"-"`     // both are in the record's ID
	ID       string    `json:"-"`     // 1 to 255 bytes of any value
	First    time.Time `json:"first"` // when version 1 was made
	DataVersion
}

// OldVersion is the record of a version of a data key that is not the newest.
type OldVersion struct {
	Rev uint64 `json:"-"`

	Database string `json:"-"`
	ID       string `json:"-"`
	DataVersion
}

// CreateDatabase writes a database that does not exist yet, and in the same step its
// master key, whose Databases have it.
func (c *Catalog) CreateDatabase(ctx context.Context, db Database, key Key) (Database, Key, error) {
	r, err := encodeDatabase(db)
	if err != nil {
		return Database{}, Key{}, err
	}
	k, err := encodeKey(key)
	if err != nil {
		return Database{}, Key{}, err
	}
	rev, err := c.store.Apply(ctx, r, k)
	if err != nil {
		return Database{}, Key{}, fmt.Errorf("making database %q: %w", db.Name, err)
	}
	db.Rev, key.Rev = rev, rev
	return db, key, nil
}

// Database returns the database of that name, or ErrNotFound.
func (c *Catalog) Database(ctx context.Context, name string) (Database, error) {
	r, err := c.store.Get(ctx, KindDatabase, name)
	if err != nil {
		return Database{}, fmt.Errorf("reading database %q: %w", name, err)
	}
	return decodeDatabase(r)
}

// Databases yields up to limit databases, 0 for all, whose name starts with prefix and is
// greater than after, by name. It ends with the first error.
func (c *Catalog) Databases(ctx context.Context, prefix, after string, limit int) iter.Seq2[Database, error] {
	return decoded(c.store.List(ctx, KindDatabase, prefix, after, limit), decodeDatabase)
}

// DataKey returns a data key with its newest version, or ErrNotFound.
func (c *Catalog) DataKey(ctx context.Context, database, id string) (DataKey, error) {
	r, err := c.store.Get(ctx, KindDataKey, dataKeyID(database, id))
	if err != nil {
		return DataKey{}, fmt.Errorf("reading data key %q of database %q: %w", id, database, err)
	}
	return decodeDataKey(r)
}

// OldVersion returns a version of a data key that is not the newest, or ErrNotFound.
func (c *Catalog) OldVersion(ctx context.Context, database, id string, number int) (OldVersion, error) {
	r, err := c.store.Get(ctx, KindDataVersion, dataVersionID(database, id, number))
	if err != nil {
		return OldVersion{}, fmt.Errorf("reading version %d of data key %q of database %q: %w", number, id, database, err)
	}
	return decodeOldVersion(r)
}

// DataKeys yields up to limit data keys of a database, 0 for all, whose ID starts with
// prefix and is greater than after, by ID. It ends with the first error.
func (c *Catalog) DataKeys(ctx context.Context, database, prefix, after string, limit int) iter.Seq2[DataKey, error] {
	if after != "" {
		after = dataKeyID(database, after)
	}
	return decoded(c.store.List(ctx, KindDataKey, dataKeyID(database, prefix), after, limit), decodeDataKey)
}

// OldVersions yields up to limit versions of data keys of a database that are not the
// newest, after one of them (the zero value: from the first), in an order that does
// not change. It ends with the first error.
func (c *Catalog) OldVersions(ctx context.Context, database string, after OldVersion, limit int) iter.Seq2[OldVersion, error] {
	from := ""
	if after.ID != "" {
		from = dataVersionID(database, after.ID, after.Number)
	}
	return decoded(c.store.List(ctx, KindDataVersion, dataKeyID(database, ""), from, limit), decodeOldVersion)
}

// CountDataKeys returns how many data keys a database has, and how many versions there
// are of all of them.
func (c *Catalog) CountDataKeys(ctx context.Context, database string) (keys, versions int, err error) {
	keys, err = c.store.Count(ctx, KindDataKey, dataKeyID(database, ""))
	if err != nil {
		return 0, 0, fmt.Errorf("counting the data keys of database %q: %w", database, err)
	}
	old, err := c.store.Count(ctx, KindDataVersion, dataKeyID(database, ""))
	if err != nil {
		return 0, 0, fmt.Errorf("counting the data keys of database %q: %w", database, err)
	}
	return keys, keys + old, nil
}

// PutDataKey writes the newest version of a data key if the catalog holds it at dk.Rev (0:
// it is a new key), and in the same step old, the version that was the newest before,
// nil for a new key. It must be wrapped under the newest enabled version of master, which
// must still be at its Rev: so nothing is ever written under a version that has been
// rotated away, disabled or destroyed meanwhile, and a rekey misses nothing. ErrConflict:
// one of them has changed.
func (c *Catalog) PutDataKey(ctx context.Context, master Key, dk DataKey, old *OldVersion) (DataKey, error) {
	if err := checkMaster(master, dk.DataVersion); err != nil {
		return DataKey{}, fmt.Errorf("writing version %d of data key %q of database %q: %w", dk.Number, dk.ID, dk.Database, err)
	}
	r, err := encodeDataKey(dk)
	if err != nil {
		return DataKey{}, err
	}
	changes := []Record{r, {Kind: KindKey, ID: master.Name, Rev: master.Rev, Keep: true}}
	if old != nil {
		r, err := encodeOldVersion(*old)
		if err != nil {
			return DataKey{}, err
		}
		changes = append(changes, r)
	}
	rev, err := c.store.Apply(ctx, changes...)
	if err != nil {
		return DataKey{}, fmt.Errorf("writing version %d of data key %q of database %q: %w", dk.Number, dk.ID, dk.Database, err)
	}
	dk.Rev = rev
	return dk, nil
}

// MarkDataKey writes a data key whose newest version has got another mark (Deleted) but is
// the same otherwise. ErrConflict: it is not at dk.Rev.
func (c *Catalog) MarkDataKey(ctx context.Context, dk DataKey) (DataKey, error) {
	r, err := encodeDataKey(dk)
	if err != nil {
		return DataKey{}, err
	}
	if dk.Rev, err = c.store.Apply(ctx, r); err != nil {
		return DataKey{}, fmt.Errorf("marking data key %q of database %q: %w", dk.ID, dk.Database, err)
	}
	return dk, nil
}

func encodeDatabase(db Database) (Record, error) {
	if err := checkDatabase(db); err != nil {
		return Record{}, fmt.Errorf("writing database %q: %w", db.Name, err)
	}
	return encode(KindDatabase, db.Name, db.Rev, databaseRecord{headOf(KindDatabase), db})
}

func decodeDatabase(r Record) (Database, error) {
	var v databaseRecord
	if err := decode(r, &v); err != nil {
		return Database{}, err
	}
	if err := errors.Join(checkDatabase(v.Database), checkID(r, v.Database.Name)); err != nil {
		return Database{}, damaged(r, err)
	}
	v.Database.Rev = r.Rev
	return v.Database, nil
}

func encodeDataKey(dk DataKey) (Record, error) {
	if err := errors.Join(checkDataKeyID(dk.Database, dk.ID), checkDataVersion(dk.DataVersion)); err != nil {
		return Record{}, fmt.Errorf("writing data key %q of database %q: %w", dk.ID, dk.Database, err)
	}
	return encode(KindDataKey, dataKeyID(dk.Database, dk.ID), dk.Rev, dataKeyRecord{headOf(KindDataKey), dk})
}

func decodeDataKey(r Record) (DataKey, error) {
	var v dataKeyRecord
	if !scanDataKey(r.Value, &v.DataKey) {
		v = dataKeyRecord{}
		if err := decode(r, &v); err != nil {
			return DataKey{}, err
		}
	}
	database, id, _ := strings.Cut(r.ID, "/")
	if err := errors.Join(checkDataKeyID(database, id), checkDataVersion(v.DataVersion)); err != nil {
		return DataKey{}, damaged(r, err)
	}
	v.DataKey.Rev, v.DataKey.Database, v.DataKey.ID = r.Rev, database, id
	return v.DataKey, nil
}

func encodeOldVersion(o OldVersion) (Record, error) {
	if err := errors.Join(checkDataKeyID(o.Database, o.ID), checkDataVersion(o.DataVersion)); err != nil {
		return Record{}, fmt.Errorf("writing version %d of data key %q of database %q: %w", o.Number, o.ID, o.Database, err)
	}
	return encode(KindDataVersion, dataVersionID(o.Database, o.ID, o.Number), o.Rev, oldVersionRecord{headOf(KindDataVersion), o})
}

func decodeOldVersion(r Record) (OldVersion, error) {
	var v oldVersionRecord
	if !scanOldVersion(r.Value, &v.OldVersion) {
		v = oldVersionRecord{}
		if err := decode(r, &v); err != nil {
			return OldVersion{}, err
		}
	}
	database, rest, _ := strings.Cut(r.ID, "/")
	id := rest[:max(0, len(rest)-len(versionSuffix(0)))]
	err := errors.Join(checkDataKeyID(database, id), checkDataVersion(v.DataVersion), checkID(r, dataVersionID(database, id, v.Number)))
	if err != nil {
		return OldVersion{}, damaged(r, err)
	}
	v.OldVersion.Rev, v.OldVersion.Database, v.OldVersion.ID = r.Rev, database, id
	return v.OldVersion, nil
}

type databaseRecord struct {
	head
	Database
}

type dataKeyRecord struct {
	head
	DataKey
}

type oldVersionRecord struct {
	head
	OldVersion
}

// dataKeyID joins with a slash, which no database's name has.
func dataKeyID(database, id string) string { return database + "/" + id }

// dataVersionID ends in a number of fixed length, whatever bytes the ID has.
func dataVersionID(database, id string, number int) string {
	return dataKeyID(database, id) + versionSuffix(number)
}

func versionSuffix(number int) string { return fmt.Sprintf("/%010d", number) }

// Limits of a data key. An envelope holds 64 KiB and its header.
const (
	MaxDataKeyID = 255 // bytes
	maxDatabase  = 128 // bytes of a database's name
	maxEnvelope  = 65 << 10
)

func checkDatabase(db Database) error {
	return errors.Join(checkDatabaseName(db.Name), checkText("key", db.Key, MaxID), checkOptional("job", db.Job, maxText))
}

func checkDataKeyID(database, id string) error {
	return errors.Join(checkDatabaseName(database), checkText("ID", id, MaxDataKeyID))
}

func checkDatabaseName(name string) error {
	if strings.Contains(name, "/") {
		return errors.New("the name of a database has no slash")
	}
	return checkText("database", name, maxDatabase)
}

func checkOptional(what, s string, limit int) error {
	if s == "" {
		return nil
	}
	return checkText(what, s, limit)
}

// checkMaster refuses what is not wrapped under the newest enabled version of a key.
func checkMaster(master Key, v DataVersion) error {
	if newest := master.Newest(); v.Master != newest {
		return fmt.Errorf("it is wrapped under version %d of key %q, whose newest enabled version is %d", v.Master, master.Name, newest)
	}
	return nil
}

func checkDataVersion(v DataVersion) error {
	switch {
	case v.Number < 1 || v.Master < 1:
		return errors.New("version " + strconv.Itoa(v.Number) + " under version " + strconv.Itoa(v.Master) + " of the master key")
	case len(v.Envelope) == 0:
		return errors.New("no envelope")
	case len(v.Envelope) > maxEnvelope:
		return fmt.Errorf("an envelope of %d bytes: %w", len(v.Envelope), ErrTooLarge)
	}
	return nil
}
