package kms_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/catalogtest"
)

// keeper is a rig with a database and what is in its catalog.
type keeper struct {
	*rig
	c *catalog.Catalog
}

// newKeeper starts a service with the databases shop and bank, which have one master key,
// and mint, which has another.
func newKeeper(t *testing.T) *keeper {
	t.Helper()
	r := newDatabaseRig(t)
	store := r.disk.Reopen()
	r.mustStartOn(store)
	t.Cleanup(r.stop)
	for name, key := range map[string]string{"shop": "master", "bank": "master", "mint": "mint"} {
		if _, err := r.CreateDatabase(t.Context(), name, api.DatabaseOptions{Key: key}); err != nil {
			t.Fatal(err)
		}
	}
	return &keeper{r, catalog.New(store)}
}

// put puts a data key in the clear and returns its record.
func (k *keeper) put(database, id, plaintext string) catalog.DataKey {
	k.t.Helper()
	if _, err := k.PutNamedKey(k.t.Context(), database, id, api.NamedKeyPut{Plaintext: []byte(plaintext)}); err != nil {
		k.t.Fatal(err)
	}
	return k.record(database, id)
}

func (k *keeper) record(database, id string) catalog.DataKey {
	k.t.Helper()
	dk, err := k.c.DataKey(k.t.Context(), database, id)
	if err != nil {
		k.t.Fatal(err)
	}
	return dk
}

// forge writes a record past the service.
func (k *keeper) forge(key string, dk catalog.DataKey, old *catalog.OldVersion) {
	k.t.Helper()
	master, err := k.c.Key(k.t.Context(), key)
	if err != nil {
		k.t.Fatal(err)
	}
	if _, err := k.c.PutDataKey(k.t.Context(), master, dk, old); err != nil {
		k.t.Fatal(err)
	}
}

func TestEnvelopeUnwrapsInItsOwnPlaceOnly(t *testing.T) {
	for _, c := range []struct {
		name  string
		forge func(k *keeper, dk catalog.DataKey) (database, id string, version int)
	}{
		{"under another ID", func(k *keeper, dk catalog.DataKey) (string, string, int) {
			dk.Rev, dk.ID = 0, "2"
			k.forge("master", dk, nil)
			return "shop", "2", 0
		}},
		{"as another version", func(k *keeper, dk catalog.DataKey) (string, string, int) {
			old := catalog.OldVersion{Database: dk.Database, ID: dk.ID, DataVersion: dk.DataVersion}
			dk.Number++
			k.forge("master", dk, &old)
			return "shop", "1", 2
		}},
		{"as an older version", func(k *keeper, dk catalog.DataKey) (string, string, int) {
			next := k.put("shop", "2", "another secret")
			old := catalog.OldVersion{Database: next.Database, ID: next.ID, DataVersion: next.DataVersion}
			old.Envelope = dk.Envelope
			next.Number++
			k.forge("master", next, &old)
			return "shop", "2", 1
		}},
		{"in a database with the same master key", func(k *keeper, dk catalog.DataKey) (string, string, int) {
			dk.Rev, dk.Database = 0, "bank"
			k.forge("master", dk, nil)
			return "bank", "1", 0
		}},
		{"in a database with another master key", func(k *keeper, dk catalog.DataKey) (string, string, int) {
			dk.Rev, dk.Database = 0, "mint"
			k.forge("mint", dk, nil)
			return "mint", "1", 0
		}},
		{"as an object", func(k *keeper, dk catalog.DataKey) (string, string, int) {
			dk.Object = true
			k.forge("master", dk, nil)
			return "shop", "1", 0
		}},
		{"altered", func(k *keeper, dk catalog.DataKey) (string, string, int) {
			dk.Envelope = bytes.Clone(dk.Envelope)
			dk.Envelope[len(dk.Envelope)-1]++
			k.forge("master", dk, nil)
			return "shop", "1", 0
		}},
		{"cut short", func(k *keeper, dk catalog.DataKey) (string, string, int) {
			dk.Envelope = dk.Envelope[:20]
			k.forge("master", dk, nil)
			return "shop", "1", 0
		}},
		{"made by another caller", func(k *keeper, dk catalog.DataKey) (string, string, int) {
			var err error
			if dk.Envelope, err = k.Wrap(k.t.Context(), "master", []byte("a key of an attacker"), []byte("shop/1")); err != nil {
				k.t.Fatal(err)
			}
			k.forge("master", dk, nil)
			return "shop", "1", 0
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := newKeeper(t)
				database, id, version := c.forge(k, k.put("shop", "1", "secret"))
				named, err := k.NamedKey(t.Context(), database, id, version)
				wantError(t, err, kms.ErrCorrupt, fmt.Sprintf("of data key %q of database %q does not unwrap", id, database))
				if named.Plaintext != nil {
					t.Errorf("it gave %q", named.Plaintext)
				}
			})
		})
	}
}

func TestVersionThatTheCatalogHasLostIsNotAbsent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper(t)
		dk := k.put("shop", "1", "secret")
		dk.Number = 3 // without versions 1 and 2
		k.forge("master", dk, nil)
		_, err := k.NamedKey(t.Context(), "shop", "1", 2)
		wantError(t, err, kms.ErrInternal, `reading version 2 of data key "1" of database "shop": no such record`)
	})
}

func TestDataKeyHasAtMost100000Versions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper(t)
		dk := k.put("shop", "1", "secret")
		dk.Number = 99_999
		k.forge("master", dk, nil)
		if made := k.put("shop", "1", "the last"); made.Number != 100_000 {
			t.Errorf("made version %d", made.Number)
		}
		_, err := k.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{})
		wantError(t, err, kms.ErrState, `data key "1" of database "shop" has 100000 versions, and more are not possible`)
		_, err = k.RotateNamedKey(t.Context(), "shop", "1")
		wantError(t, err, kms.ErrState, "has 100000 versions")
	})
}

// Nobody may take a fault of the HSMs for the absence of a key: a database that is told so
// makes a new one and loses its data.
func TestAbsenceIsToldOnlyWhenItIsCertain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDatabaseRig(t)
		store := &faulty{Store: r.disk.Reopen()}
		r.mustStartOn(store)
		defer r.stop()
		if _, err := r.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{}); err != nil {
			t.Fatal(err)
		}
		for _, h := range r.hsms {
			h.leave()
		}
		synctest.Wait()
		_, err := r.NamedKey(t.Context(), "shop", "1", 0)
		wantError(t, err, kms.ErrGroupLost, "")
		_, err = r.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{})
		wantError(t, err, kms.ErrGroupLost, "")
		_, err = r.NamedKey(t.Context(), "shop", "2", 0)
		wantError(t, err, kms.ErrNotFound, `database "shop" has no data key "2"`)
		if k, err := r.DescribeNamedKey(t.Context(), "shop", "1"); err != nil || k.Version != 1 {
			t.Errorf("described as %+v, %v", k, err)
		}
		store.setBlind(true)
		for _, id := range []string{"1", "2"} {
			_, err = r.NamedKey(t.Context(), "shop", id, 0)
			wantError(t, err, kms.ErrInternal, "input/output error")
		}
	})
}

func TestDatabaseOfAGroupThatIsNotConfigured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, other := newRig(t, 1), newRig(t, 1)
		other.group.Name = "archive"
		config := kms.Config{Catalog: catalogtest.NewMemory(), Groups: []kms.GroupConfig{r.group, other.group}}
		var err error
		if r.KMS, err = kms.Open(t.Context(), config); err != nil {
			t.Fatal(err)
		}
		db, err := r.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{KeyOptions: kms.KeyOptions{Group: "archive"}})
		if err != nil || db.Group != "archive" {
			t.Fatalf("%+v, %v", db, err)
		}
		if _, err := r.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{}); err != nil {
			t.Fatal(err)
		}
		r.stop()
		config.Groups = config.Groups[:1]
		if r.KMS, err = kms.Open(t.Context(), config); err != nil {
			t.Fatal(err)
		}
		defer r.stop()
		_, err = r.NamedKey(t.Context(), "shop", "1", 0)
		wantError(t, err, kms.ErrUnavailable, `key shop belongs to group "archive", which is not configured`)
		_, err = r.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{})
		wantError(t, err, kms.ErrUnavailable, "which is not configured")
		_, err = r.CreateDatabase(t.Context(), "second", api.DatabaseOptions{Key: "shop"})
		wantError(t, err, kms.ErrUnavailable, "which is not configured")
	})
}

func TestUnknownFormatIsRefused(t *testing.T) {
	r := newRig(t, 1)
	_, err := kms.Open(t.Context(), kms.Config{
		Catalog: r.disk, Groups: []kms.GroupConfig{r.group}, Formats: map[string]string{"shop": "oracle", "bank": api.FormatMariaDB},
	})
	wantError(t, err, kms.ErrBadRequest, `database "shop": there is no format "oracle"`)
}

func TestMariaDBIsToldWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDatabaseRig(t).mustStart()
		defer r.stop()
		if _, err := r.CreateDatabase(t.Context(), apitest.MariaDB, api.DatabaseOptions{}); err != nil {
			t.Fatal(err)
		}
		_, err := r.PutNamedKey(t.Context(), apitest.MariaDB, "1", api.NamedKeyPut{Bytes: 20})
		wantError(t, err, kms.ErrBadRequest, "are for MariaDB, which wants 16, 24 or 32 bytes, not 20: it would take any other length, and stop when it writes a page")
		_, err = r.PutNamedKey(t.Context(), apitest.MariaDB, "1", api.NamedKeyPut{Plaintext: []byte("{}"), Object: true})
		wantError(t, err, kms.ErrBadRequest, "wants the bytes of a key, not a JSON object")
		if _, err := r.PutNamedKey(t.Context(), apitest.MariaDB, "1", api.NamedKeyPut{}); err != nil {
			t.Fatal(err)
		}
		wantError(t, r.DeleteNamedKey(t.Context(), apitest.MariaDB, "1"), kms.ErrState, "MariaDB may need every version of it for ever")
	})
}

func TestErrorsOfDataKeysHaveTheirCauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper(t)
		k.put("shop", "1", "secret")
		for cas, want := range map[int]struct {
			err  error
			text string
		}{
			0: {kms.ErrExists, `there is a data key "1" of database "shop" already, its newest version is 1`},
			7: {kms.ErrState, `the newest version of data key "1" of database "shop" is 1, but cas is 7`},
		} {
			_, err := k.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{CAS: &cas})
			wantError(t, err, want.err, want.text)
			if !errors.Is(err, api.ErrCAS) {
				t.Errorf("the cause of %v is not %v", err, api.ErrCAS)
			}
		}
		if _, err := k.NamedKey(t.Context(), "nowhere", "1", 0); !errors.Is(err, kms.ErrNotFound) || !errors.Is(err, api.ErrNoDatabase) {
			t.Errorf("the cause of %v is not %v", err, api.ErrNoDatabase)
		}
		if err := k.DeleteNamedKey(t.Context(), "shop", "1"); err != nil {
			t.Fatal(err)
		}
		_, read := k.NamedKey(t.Context(), "shop", "1", 0)
		_, rotated := k.RotateNamedKey(t.Context(), "shop", "1")
		for _, err := range []error{read, rotated} {
			wantError(t, err, kms.ErrNotFound, `version 1 of data key "1" of database "shop" was deleted at`)
			if !errors.Is(err, api.ErrDeleted) {
				t.Errorf("the cause of %v is not %v", err, api.ErrDeleted)
			}
		}
	})
}

// underNewest is a store that looks at every data key that is committed: the version of the
// master key that wraps it has to be the newest at that moment.
type underNewest struct {
	catalog.Store
	t  *testing.T
	mu sync.Mutex // held while something is written
	n  int        // data keys that were looked at
}

func (u *underNewest) Apply(ctx context.Context, changes ...catalog.Record) (uint64, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	rev, err := u.Store.Apply(ctx, changes...)
	if err != nil {
		return rev, err
	}
	c := catalog.New(u.Store)
	for _, r := range changes {
		if r.Kind != catalog.KindDataKey {
			continue
		}
		database, id, _ := strings.Cut(r.ID, "/")
		dk, err := c.DataKey(ctx, database, id)
		if err != nil {
			u.t.Error(err)
		}
		master, err := c.Key(ctx, database)
		if err != nil {
			u.t.Error(err)
		}
		if newest := master.Versions[len(master.Versions)-1].Number; dk.Master != newest {
			u.t.Errorf("version %d of data key %s was committed under version %d of its master key, the newest is %d", dk.Number, id, dk.Master, newest)
		}
		u.n++
	}
	return rev, nil
}

func TestNothingIsCommittedUnderAVersionThatWasRotatedAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDatabaseRig(t)
		store := &underNewest{Store: r.disk.Reopen(), t: t}
		r.mustStartOn(store)
		defer r.stop()
		if _, err := r.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{}); err != nil {
			t.Fatal(err)
		}
		const writers, puts, rotations = 8, 40, 20
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for i := range puts {
					id := fmt.Sprint((w + i) % 4)
					k, err := r.PutNamedKey(t.Context(), "shop", id, api.NamedKeyPut{Plaintext: fmt.Appendf(nil, "%d %d", w, i)})
					if err != nil {
						t.Error(err)
						return
					}
					found, err := r.NamedKey(t.Context(), "shop", id, k.Version)
					if err != nil || string(found.Plaintext) != fmt.Sprintf("%d %d", w, i) {
						t.Errorf("version %d of data key %s is %q, %v", k.Version, id, found.Plaintext, err)
					}
				}
			})
		}
		wg.Go(func() {
			for range rotations {
				if _, err := r.Rotate(t.Context(), "shop"); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Wait()
		if db, err := r.Database(t.Context(), "shop"); err != nil || db.Versions != writers*puts || db.Keys != 4 || db.Version != rotations+1 {
			t.Errorf("the database is %+v, %v", db, err)
		}
		if store.n != writers*puts {
			t.Errorf("%d data keys were looked at", store.n)
		}
	})
}

func TestNoDataKeyInTheLogOrTheCatalog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper(t)
		const secret = "0123456789abcdef secret"
		k.put("shop", "1", secret)
		k.put("shop", "1", secret)
		for _, text := range []string{secret, hex.EncodeToString([]byte(secret))} {
			if strings.Contains(k.log.String(), text) {
				t.Errorf("the log has %q", text)
			}
		}
		if !strings.Contains(k.log.String(), "database created") || !strings.Contains(k.log.String(), "data key made") {
			t.Error("the log does not tell what was made")
		}
		if dk := k.record("shop", "1"); bytes.Contains(dk.Envelope, []byte(secret)) {
			t.Error("the catalog has it in the clear")
		}
	})
}
