package api

import (
	"context"
	"io"
)

// Backups is who can put everything that kmsd remembers into a file.
type Backups interface {
	// Backup writes the catalog and every living master key, wrapped under the domain of
	// its group, encrypted to the recipients (age1...), at least one. What was written
	// before an error is no backup. It takes as long as its keys need.
	Backup(ctx context.Context, w io.Writer, recipients []string) (BackupReport, error)
}

// BackupBody asks for a backup.
type BackupBody struct {
	Recipients []string `json:"recipients"`
}

// BackupReport says what is in a backup.
type BackupReport struct {
	Keys      int `json:"keys"`     // master keys
	Versions  int `json:"versions"` // of them, that live: each with its wrapped key
	Databases int `json:"databases"`
	NamedKeys int `json:"named_keys"` // versions of data keys
}
