package kms_test

import (
	"path/filepath"
	"testing"

	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/boltcat"
)

func TestServiceKeepsDataKeys(t *testing.T) {
	t.Run("in memory", func(t *testing.T) {
		apitest.RunDatabases(t, func(t *testing.T) apitest.DatabaseService {
			r := newDatabaseRig(t)
			r.mustStart()
			t.Cleanup(r.stop)
			return r.KMS
		})
	})
	t.Run("on disk", func(t *testing.T) {
		apitest.RunDatabases(t, func(t *testing.T) apitest.DatabaseService {
			r := newDatabaseRig(t)
			r.mustStartOn(openBolt(t))
			t.Cleanup(r.stop)
			return r.KMS
		})
	})
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
