package kms_test

import (
	"errors"
	"testing"
	"testing/synctest"

	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

func TestFormatsCanBeExchanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newDatabaseRig(t).mustStart()
		defer r.stop()
		put := func(database string) error {
			_, err := r.PutNamedKey(t.Context(), database, "1", api.NamedKeyPut{Plaintext: make([]byte, 20)})
			return err
		}
		for _, name := range []string{apitest.MariaDB, "other"} {
			if _, err := r.CreateDatabase(t.Context(), name, api.DatabaseOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if err := put(apitest.MariaDB); !errors.Is(err, api.ErrBadRequest) {
			t.Errorf("20 bytes for MariaDB: %v", err)
		}
		formats := map[string]string{"other": api.FormatMariaDB}
		r.SetFormats(formats)
		clear(formats) // it is the caller's
		if err := put(apitest.MariaDB); err != nil {
			t.Errorf("20 bytes where MariaDB has gone: %v", err)
		}
		if err := put("other"); !errors.Is(err, api.ErrBadRequest) {
			t.Errorf("20 bytes where MariaDB has come: %v", err)
		}
		if db, err := r.Database(t.Context(), "other"); err != nil || db.Format != api.FormatMariaDB {
			t.Errorf("it shows as %q, %v", db.Format, err)
		}
	})
}
