package kms_test

import (
	"path/filepath"
	"testing"
	"testing/synctest"

	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/boltcat"
	"kmsd/kms/catalog/catalogtest"
)

func TestServiceKeepsDataKeys(t *testing.T) {
	for name, open := range services() {
		t.Run(name, func(t *testing.T) { apitest.RunDatabases(t, synctest.Test, open) })
	}
}

func TestServiceRekeys(t *testing.T) {
	for name, open := range services() {
		t.Run(name, func(t *testing.T) { apitest.RunRekeys(t, synctest.Test, open) })
	}
}

// services opens a service on each kind of store.
func services() map[string]apitest.OpenDatabases {
	open := func(store func(*testing.T) catalog.Store) apitest.OpenDatabases {
		return func(t *testing.T) apitest.DatabaseService {
			r := newDatabaseRig(t)
			r.mustStartOn(store(t))
			t.Cleanup(r.stop)
			return r.KMS
		}
	}
	return map[string]apitest.OpenDatabases{
		"in memory": open(func(*testing.T) catalog.Store { return catalogtest.NewMemory() }),
		"on disk":   open(func(t *testing.T) catalog.Store { return openBolt(t) }),
	}
}

// newDatabaseRig makes a rig of two members in which one database is for MariaDB.
func newDatabaseRig(t testing.TB) *rig {
	r := newRig(t, 2)
	r.formats = map[string]string{apitest.MariaDB: api.FormatMariaDB}
	return r
}

// openBolt opens a catalog on disk that is closed at the end.
func openBolt(t testing.TB) catalog.Store {
	t.Helper()
	store, err := boltcat.Open(filepath.Join(t.TempDir(), "catalog.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return store
}
