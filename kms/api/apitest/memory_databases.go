package apitest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"kmsd/kms/api"
)

// memoryDatabase is a database with its data keys. Nobody wraps them: a version knows
// under which version of the master key it would be.
type memoryDatabase struct {
	api.Database
	keys map[string]*memoryNamed // :: ID → it
}

// memoryNamed is a data key with all its versions, in the order of their numbers.
type memoryNamed struct {
	versions []api.NamedKey
}

func (dk *memoryNamed) newest() api.NamedKey { return dk.versions[len(dk.versions)-1] }

// show returns a version as it is given away.
func (dk *memoryNamed) show(version int, plaintext bool) api.NamedKey {
	v := dk.versions[version-1]
	v.Newest, v.First = len(dk.versions), dk.versions[0].Created
	v.Plaintext = bytes.Clone(v.Plaintext)
	if !plaintext {
		v.Plaintext = nil
	}
	return v
}

func (db *memoryDatabase) count() (keys, versions int) {
	for _, dk := range db.keys {
		versions += len(dk.versions)
	}
	return len(db.keys), versions
}

// key returns a data key that exists.
func (db *memoryDatabase) key(id string) (*memoryNamed, error) {
	if err := api.CheckNamedKeyID(id); err != nil {
		return nil, err
	}
	dk, ok := db.keys[id]
	if !ok {
		return nil, api.NewError(api.CodeNotFound, fmt.Sprintf("database %s has no data key %q", db.Name, id), nil)
	}
	return dk, nil
}

// in calls f with the database of that name, under the lock.
func (m *Memory) in(ctx context.Context, method, name string, f func(db *memoryDatabase) error) error {
	if err := m.begin(ctx, method, name); err != nil {
		return err
	}
	if err := api.CheckDatabaseName(name); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	db, ok := m.databases[name]
	if !ok {
		return api.NewError(api.CodeNotFound, "there is no database "+name, api.ErrNoDatabase)
	}
	return f(db)
}

// databaseLocked is a database as it is shown.
func (m *Memory) databaseLocked(db *memoryDatabase) api.Database {
	shown := db.Database
	shown.Group, shown.Version, shown.Format = MemoryGroup, m.keys[db.Key].Primary, m.Formats[db.Name]
	return shown
}

// CreateDatabase makes a database.
func (m *Memory) CreateDatabase(ctx context.Context, name string, opts api.DatabaseOptions) (api.Database, error) {
	if err := m.begin(ctx, "CreateDatabase", name); err != nil {
		return api.Database{}, err
	}
	opts.Key = cmp.Or(opts.Key, name)
	if err := cmp.Or(api.CheckDatabaseName(name), api.CheckName(opts.Key)); err != nil {
		return api.Database{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, taken := m.databases[name]; taken {
		return api.Database{}, api.NewError(api.CodeExists, "there is a database "+name+" already", nil)
	}
	if t := cmp.Or(opts.Type, "aes-256"); !slices.Contains(aesTypes(), t) {
		return api.Database{}, api.NewError(api.CodeBadRequest, "a key of type "+t+" does not wrap", nil)
	}
	k, ok := m.keys[opts.Key]
	if !ok {
		var err error
		if k, err = m.makeLocked(opts.Key, opts.KeyOptions); err != nil {
			return api.Database{}, err
		}
	}
	switch {
	case !slices.Contains(aesTypes(), k.Type):
		return api.Database{}, api.NewError(api.CodeBadRequest, "a key of type "+k.Type+" does not wrap", nil)
	case opts.Type != "" && opts.Type != k.Type, opts.Group != "" && opts.Group != k.Group,
		opts.MinCopies != 0 && opts.MinCopies != k.MinCopies, opts.RotationPeriod != 0 && opts.RotationPeriod != k.RotationPeriod:
		return api.Database{}, api.NewError(api.CodeBadRequest, "key "+k.Name+" exists and is another than was asked for", nil)
	}
	if err := k.is(api.StateEnabled); err != nil {
		return api.Database{}, err
	}
	if m.databases == nil {
		m.databases = make(map[string]*memoryDatabase)
	}
	db := &memoryDatabase{
		Database: api.Database{Name: name, Key: k.Name, Created: time.Now().UTC()}, keys: make(map[string]*memoryNamed),
	}
	m.databases[name] = db
	k.Databases = append(k.Databases, name)
	slices.Sort(k.Databases)
	return m.databaseLocked(db), nil
}

// Database shows a database.
func (m *Memory) Database(ctx context.Context, name string) (shown api.Database, err error) {
	err = m.in(ctx, "Database", name, func(db *memoryDatabase) error {
		shown = m.databaseLocked(db)
		shown.Keys, shown.Versions = db.count()
		return nil
	})
	return shown, err
}

// Databases lists databases by name.
func (m *Memory) Databases(ctx context.Context, opts api.ListOptions) (api.DatabasePage, error) {
	if err := m.begin(ctx, "Databases", ""); err != nil {
		return api.DatabasePage{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	names, more, err := pageOf(m.databases, opts.Prefix, opts.After, opts.Limit)
	page := api.DatabasePage{Databases: []api.Database{}}
	for _, name := range names {
		page.Databases = append(page.Databases, m.databaseLocked(m.databases[name]))
	}
	if more {
		page.Next = names[len(names)-1]
	}
	return page, err
}

// pageOf returns the names of a page, and whether there are more after it.
func pageOf[T any](things map[string]T, prefix, after string, limit int) (names []string, more bool, err error) {
	if limit < 0 || limit > api.MaxPage {
		return nil, false, api.NewError(api.CodeBadRequest, fmt.Sprintf("a page has 1 to %d entries", api.MaxPage), nil)
	}
	limit = cmp.Or(limit, 100)
	for _, name := range slices.Sorted(maps.Keys(things)) {
		if strings.HasPrefix(name, prefix) && name > after {
			names = append(names, name)
		}
	}
	if len(names) > limit {
		return names[:limit], true, nil
	}
	return names, false, nil
}

// PutNamedKey makes the first or the next version of a data key.
func (m *Memory) PutNamedKey(ctx context.Context, database, id string, put api.NamedKeyPut) (made api.NamedKey, err error) {
	err = m.in(ctx, "PutNamedKey", database, func(db *memoryDatabase) error {
		if err := api.CheckNamedKeyID(id); err != nil {
			return err
		}
		dk, ok := db.keys[id]
		if !ok {
			dk = &memoryNamed{}
		}
		if err := checkPut(put); err != nil {
			return err
		}
		if err := checkCAS(put.CAS, len(dk.versions)); err != nil {
			return err
		}
		value := bytes.Clone(put.Plaintext)
		if value == nil {
			n := put.Bytes
			if n == 0 && ok && !dk.newest().Object {
				n = len(dk.newest().Plaintext)
			}
			value = randomBytes(cmp.Or(n, 32))
		}
		if made, err = m.putLocked(db, dk, id, value, put.Object); err == nil {
			db.keys[id] = dk
		}
		return err
	})
	return made, err
}

func checkPut(put api.NamedKeyPut) error {
	bad := func(format string, args ...any) error {
		return api.NewError(api.CodeBadRequest, fmt.Sprintf(format, args...), nil)
	}
	switch {
	case put.Plaintext != nil && len(put.Plaintext) == 0:
		return bad("the data key is empty")
	case len(put.Plaintext) > api.MaxPlaintext:
		return api.NewError(api.CodeTooLarge, fmt.Sprintf("the data key is longer than %d bytes", api.MaxPlaintext), nil)
	case put.Plaintext != nil && put.Bytes != 0:
		return bad("a data key is given or made, not both")
	case put.Bytes < 0 || put.Bytes > api.MaxDataKey:
		return bad("a data key that is made has 1 to %d bytes", api.MaxDataKey)
	case put.Object && (!json.Valid(put.Plaintext) || !bytes.HasPrefix(bytes.TrimSpace(put.Plaintext), []byte("{"))):
		return bad("the plaintext is not a JSON object")
	case put.CAS != nil && *put.CAS < 0:
		return bad("there is no version %d", *put.CAS)
	}
	return nil
}

func checkCAS(cas *int, newest int) error {
	switch {
	case cas == nil || *cas == newest:
		return nil
	case *cas == 0:
		return api.NewError(api.CodeExists, fmt.Sprintf("the newest version is %d, not none", newest), api.ErrCAS)
	default:
		return api.NewError(api.CodeState, fmt.Sprintf("the newest version is %d, not %d", newest, *cas), api.ErrCAS)
	}
}

// putLocked adds a version.
func (m *Memory) putLocked(db *memoryDatabase, dk *memoryNamed, id string, value []byte, object bool) (api.NamedKey, error) {
	if n := len(value); m.Formats[db.Name] == api.FormatMariaDB && (object || !api.MariaDBTakes(n)) {
		return api.NamedKey{}, api.NewError(api.CodeBadRequest, "MariaDB wants a data key of 16, 24 or 32 bytes", nil)
	}
	k := m.keys[db.Key]
	if err := k.is(api.StateEnabled); err != nil {
		return api.NamedKey{}, err
	}
	v := api.NamedKey{
		Database: db.Name, Version: len(dk.versions) + 1, Created: time.Now().UTC(), Object: object, Master: k.Primary, Plaintext: value,
	}
	v.ID, v.Raw = api.ShowID(id)
	dk.versions = append(dk.versions, v)
	return dk.show(v.Version, false), nil
}

// RotateNamedKey makes the next version of a data key.
func (m *Memory) RotateNamedKey(ctx context.Context, database, id string) (made api.NamedKey, err error) {
	err = m.in(ctx, "RotateNamedKey", database, func(db *memoryDatabase) error {
		dk, err := db.key(id)
		if err != nil {
			return err
		}
		if dk.newest().Deleted != nil {
			return api.NewError(api.CodeNotFound, fmt.Sprintf("data key %q is deleted", id), api.ErrDeleted)
		}
		if dk.newest().Object {
			return api.NewError(api.CodeState, fmt.Sprintf("data key %q is a JSON object, which only its client can make", id), nil)
		}
		made, err = m.putLocked(db, dk, id, randomBytes(len(dk.newest().Plaintext)), false)
		return err
	})
	return made, err
}

// NamedKey returns a version of a data key.
func (m *Memory) NamedKey(ctx context.Context, database, id string, version int) (found api.NamedKey, err error) {
	err = m.in(ctx, "NamedKey", database, func(db *memoryDatabase) error {
		dk, err := db.key(id)
		if err != nil {
			return err
		}
		if version < 0 {
			return api.NewError(api.CodeBadRequest, fmt.Sprintf("there is no version %d", version), nil)
		}
		version := cmp.Or(version, len(dk.versions))
		if version > len(dk.versions) {
			return api.NewError(api.CodeNotFound, fmt.Sprintf("data key %q has no version %d", id, version), nil)
		}
		v := dk.show(version, true)
		if v.Deleted != nil {
			return api.NewError(api.CodeNotFound, fmt.Sprintf("version %d of data key %q is deleted", version, id), api.ErrDeleted)
		}
		if err := m.keys[db.Key].enabled(v.Master); err != nil {
			return err
		}
		found = v
		return nil
	})
	return found, err
}

// DescribeNamedKey returns the newest version of a data key without its plaintext.
func (m *Memory) DescribeNamedKey(ctx context.Context, database, id string) (found api.NamedKey, err error) {
	err = m.in(ctx, "DescribeNamedKey", database, func(db *memoryDatabase) error {
		dk, err := db.key(id)
		if err == nil {
			found = dk.show(len(dk.versions), false)
		}
		return err
	})
	return found, err
}

// NamedKeys lists data keys by ID.
func (m *Memory) NamedKeys(ctx context.Context, database string, opts api.ListOptions) (page api.NamedKeyPage, err error) {
	page.Keys = []api.NamedKey{}
	err = m.in(ctx, "NamedKeys", database, func(db *memoryDatabase) error {
		after, err := base64.RawURLEncoding.DecodeString(opts.After)
		if err != nil {
			return api.NewError(api.CodeBadRequest, "after is not what a page before has said", nil)
		}
		ids, more, err := pageOf(db.keys, opts.Prefix, string(after), opts.Limit)
		for _, id := range ids {
			dk := db.keys[id]
			page.Keys = append(page.Keys, dk.show(len(dk.versions), false))
		}
		if more {
			page.Next = base64.RawURLEncoding.EncodeToString([]byte(ids[len(ids)-1]))
		}
		return err
	})
	return page, err
}

// DeleteNamedKey marks the newest version of a data key as deleted.
func (m *Memory) DeleteNamedKey(ctx context.Context, database, id string) error {
	return m.in(ctx, "DeleteNamedKey", database, func(db *memoryDatabase) error {
		dk, err := db.key(id)
		if err != nil {
			return err
		}
		if m.Formats[database] == api.FormatMariaDB {
			return api.NewError(api.CodeState, "MariaDB may need every version for ever", nil)
		}
		if dk.newest().Deleted == nil {
			at := time.Now().UTC()
			dk.versions[len(dk.versions)-1].Deleted = &at
		}
		return nil
	})
}
