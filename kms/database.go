package kms

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/pluginproto"
)

var _ api.Databases = (*KMS)(nil)

// CreateDatabase makes a database and, when there is none, its master key. A key that a
// crash has left without its database is found by the next attempt.
func (k *KMS) CreateDatabase(ctx context.Context, name string, opts api.DatabaseOptions) (api.Database, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	db, err := k.createDatabase(ctx, name, opts)
	return db, translate("creating database "+strconv.Quote(name), err)
}

func (k *KMS) createDatabase(ctx context.Context, name string, opts api.DatabaseOptions) (api.Database, error) {
	opts.Key = cmp.Or(opts.Key, name)
	if err := cmp.Or(api.CheckDatabaseName(name), api.CheckName(opts.Key)); err != nil {
		return api.Database{}, err
	}
	for {
		if _, err := k.catalog.Database(ctx, name); err == nil {
			return api.Database{}, api.NewError(api.CodeExists, fmt.Sprintf("there is a database %q already", name), nil)
		} else if !errors.Is(err, catalog.ErrNotFound) {
			return api.Database{}, err
		}
		master, err := k.masterFor(ctx, opts)
		if err != nil {
			return api.Database{}, err
		}
		db, err := k.commitDatabase(ctx, catalog.Database{Name: name, Key: opts.Key, Created: now()}, master.rec)
		switch {
		case err == nil:
			k.log.Info("database created", "database", name, "key", db.Key, "group", master.rec.Group)
			return k.databaseToAPI(db)
		case !errors.Is(err, catalog.ErrConflict) || ctx.Err() != nil:
			return api.Database{}, ifEnded(ctx, err)
		}
		if _, err := k.refresh(ctx, opts.Key); err != nil {
			return api.Database{}, err
		}
	}
}

// masterFor returns the master key for a new database: one that exists and is as it was
// asked for, or one that is made.
func (k *KMS) masterFor(ctx context.Context, opts api.DatabaseOptions) (*key, error) {
	if _, err := k.ring.get(opts.Key); err != nil {
		if t := pluginproto.KeyType(opts.Type); t != "" && t != pluginproto.AES256 && t != pluginproto.AES128 {
			return nil, badRequest("a key of type %s does not wrap; the master key of a database is an %s or an %s", t, pluginproto.AES256, pluginproto.AES128)
		}
		if _, err := k.CreateMasterKey(ctx, opts.Key, opts.KeyOptions); err != nil && !errors.Is(err, api.ErrExists) {
			return nil, err
		}
	}
	master, err := k.wrapping(opts.Key)
	if err != nil {
		return nil, err
	}
	if _, err := k.groupOf(master.rec); err != nil {
		return nil, err
	}
	if master.primary < 0 {
		return nil, master.unusable()
	}
	return master, asAskedFor(master.rec, opts.KeyOptions)
}

// asAskedFor refuses to take an existing key for one that was asked for in other words.
func asAskedFor(rec catalog.Key, opts KeyOptions) error {
	for _, o := range []struct {
		option     string
		other      bool
		want, have any
	}{
		{"group", opts.Group != "" && opts.Group != rec.Group, opts.Group, rec.Group},
		{"type", opts.Type != "" && opts.Type != rec.Type, opts.Type, rec.Type},
		{"min_copies", opts.MinCopies != 0 && opts.MinCopies != rec.MinCopies, opts.MinCopies, rec.MinCopies},
		{"rotation_period", opts.RotationPeriod != 0 && time.Duration(opts.RotationPeriod) != rec.RotationPeriod,
			time.Duration(opts.RotationPeriod), rec.RotationPeriod},
	} {
		if o.other {
			return badRequest("key %s exists already, with %s %v and not %v; leave that out to use the key as it is", rec.Name, o.option, o.have, o.want)
		}
	}
	return nil
}

// commitDatabase writes a database and, in the same step, that its master key is used by
// it. After an error it finds out what has become of that.
func (k *KMS) commitDatabase(ctx context.Context, db catalog.Database, master catalog.Key) (catalog.Database, error) {
	master = cloneRecord(master)
	master.Databases = append(master.Databases, db.Name)
	slices.Sort(master.Databases)
	made, rec, err := k.catalog.CreateDatabase(ctx, db, master)
	if err == nil {
		return made, k.ring.put(rec)
	}
	if errors.Is(err, catalog.ErrConflict) {
		return catalog.Database{}, err
	}
	ctx, cancel := cleanup(ctx)
	defer cancel()
	found, lookup := k.catalog.Database(ctx, db.Name)
	if lookup != nil || found.Key != db.Key || !found.Created.Equal(db.Created) {
		k.byName[master.Group].janitor.suspect(master.Name) // it may be written all the same
		return catalog.Database{}, err
	}
	_, err = k.refresh(ctx, master.Name)
	return found, err
}

// Database returns a database with the number of its data keys.
func (k *KMS) Database(ctx context.Context, name string) (api.Database, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	db, err := k.readDatabase(ctx, name)
	if err != nil {
		return api.Database{}, translate("reading database "+strconv.Quote(name), err)
	}
	shown, err := k.databaseToAPI(db)
	if err == nil {
		shown.Keys, shown.Versions, err = k.catalog.CountDataKeys(ctx, name)
	}
	return shown, translate("reading database "+strconv.Quote(name), err)
}

// Databases returns a page of databases by name.
func (k *KMS) Databases(ctx context.Context, opts api.ListOptions) (api.DatabasePage, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	limit, err := pageLimit(opts.Limit)
	if err != nil {
		return api.DatabasePage{}, err
	}
	page := api.DatabasePage{Databases: []api.Database{}}
	for db, err := range k.catalog.Databases(ctx, opts.Prefix, opts.After, limit+1) {
		if err == nil && len(page.Databases) == limit {
			page.Next = page.Databases[limit-1].Name
			break
		}
		shown := api.Database{}
		if err == nil {
			shown, err = k.databaseToAPI(db)
		}
		if err != nil {
			return api.DatabasePage{}, translate("listing databases", err)
		}
		page.Databases = append(page.Databases, shown)
	}
	return page, nil
}

// readDatabase returns the record of a database. That there is none is certain.
func (k *KMS) readDatabase(ctx context.Context, name string) (catalog.Database, error) {
	if err := api.CheckDatabaseName(name); err != nil {
		return catalog.Database{}, err
	}
	db, err := k.catalog.Database(ctx, name)
	if errors.Is(err, catalog.ErrNotFound) {
		return catalog.Database{}, api.NewError(api.CodeNotFound, fmt.Sprintf("there is no database %q", name), api.ErrNoDatabase)
	}
	return db, err
}

// masterOf returns the master key of a database as it is now, without reading the
// catalog when the database was met before: it has one master key for ever.
func (k *KMS) masterOf(ctx context.Context, database string) (*key, error) {
	name, known := k.masters.Load(database)
	if !known {
		db, err := k.readDatabase(ctx, database)
		if err != nil {
			return nil, err
		}
		name = db.Key
		k.masters.Store(database, name)
	}
	return k.masterNamed(database, name.(string))
}

// masterNamed never says that something is not found: the database is there.
func (k *KMS) masterNamed(database, name string) (*key, error) {
	master, err := k.ring.get(name)
	if err != nil {
		return nil, fmt.Errorf("the catalog is damaged: it has database %q, but not its master key %q", database, name)
	}
	return master, nil
}

func pageLimit(limit int) (int, error) {
	if limit < 0 || limit > api.MaxPage {
		return 0, badRequest("limit is %d, want 1 to %d", limit, api.MaxPage)
	}
	return cmp.Or(limit, defaultPage), nil
}
