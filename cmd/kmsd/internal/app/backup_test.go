package app_test

import (
	"bytes"
	"os"
	"time"

	"filippo.io/age"
	"github.com/rogpeppe/go-internal/testscript"

	"kmsd/kms/backup"
	"kmsd/kms/catalog"
)

// writeBackup is the command "backedup FILE IDENTITY": it writes a backup of a destroyed
// key, and the identity that opens it.
func writeBackup(ts *testscript.TestScript, _ bool, args []string) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	id, err := age.GenerateX25519Identity()
	ts.Check(err)
	var file bytes.Buffer
	w, err := backup.NewWriter(&file, []age.Recipient{id.Recipient()}, backup.Header{Created: at, Kmsd: "v1.2.3", Groups: []backup.Group{}})
	ts.Check(err)
	ts.Check(w.Put(catalog.Key{Name: "old", Group: "default", Type: "aes-256", MinCopies: 1, Created: at, Versions: []catalog.Version{
		{Number: 1, Identity: "01000000000000000000000000000000", State: catalog.Destroyed, Created: at},
	}}))
	_, err = w.Close()
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), file.Bytes(), 0o600))
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(id.String()+"\n"), 0o600))
	ts.Setenv("RECIPIENT", id.Recipient().String())
	ts.Setenv("SECRET", id.String())
}
