// Package backup answers: what is in a backup, and is all of it there?
//
// A backup is one file, encrypted with age (age-encryption.org/v1) to X25519 recipients.
// Inside are lines of JSON, so that age -d shows what is kept:
//
//	{"header":{"format":"kmsd backup","version":1,…}}          once, first
//	{"record":{"kind":"datakey","id":"c2hvcC8x","value":{…}}}   a record of the catalog
//	{"blob":{"identity":"…","blob":"…",…}}                      a master key, wrapped by its HSM
//	{"trailer":{"lines":…,"sha256":"…",…}}                      once, last
//
// Records come in this order: jobs that have ended; each database, with its data keys
// behind it, each of them followed by its older versions; master keys; tombstones; usage.
// Then comes a blob for every version of a master key that lives. No key is in the clear: a
// blob opens in an HSM of the group's domain only, and data keys are envelopes.
//
// Only a file with its trailer, and the end that age gives it, is a backup. [Reader]
// finds out whether it is one: that nothing is missing, altered or in another's place,
// and that every envelope names a version that is there. What a blob holds only an HSM
// can tell.
package backup

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"filippo.io/age"

	"kmsd/kms/api"
)

// Errors of reading and writing.
var (
	// ErrIdentity: none of the identities opens the file.
	ErrIdentity = errors.New("no identity opens it: it was encrypted to other recipients, or its beginning was altered")
	// ErrDamaged: it is not all that was written. The text says what is wrong.
	ErrDamaged = errors.New("it is no whole backup")
	// ErrMoved: what was given to a Writer does not belong together, because a version was
	// destroyed meanwhile.
	ErrMoved = errors.New("a version was destroyed while the backup was made; make it again")
)

const (
	format        = "kmsd backup"
	formatVersion = 1

	transferSize = 16 // bytes

	// Limits of what a reader takes, in bytes unless said otherwise.
	maxLine   = 4 << 20 // above a record of catalog.MaxValue or a blob in base64
	maxBlob   = 1 << 20 // pluginproto.MaxBlob
	maxGroups = 1024    // groups
	maxText   = 256
	maxCheck  = 64
)

// Header is what a backup says of itself.
type Header struct {
	Created time.Time `json:"created"`
	Kmsd    string    `json:"kmsd"` // the version that wrote it
	Groups  []Group   `json:"groups"`
}

// Group is a group of HSMs whose keys are in a backup. They can be brought to HSMs of
// the same domain only.
type Group struct {
	Name        string `json:"name"`
	DomainCheck []byte `json:"domain_check"` // check value of the domain key
}

// Contents are what a backup has in it.
type Contents struct {
	Header
	api.BackupReport
}

// Blob is a master key as an HSM of its group gave it away: wrapped under the domain key.
type Blob struct {
	Identity   string `json:"identity"`
	Type       string `json:"type"`
	CheckValue []byte `json:"check_value"`
	Protocol   string `json:"protocol,omitempty"` // by which it was given away; empty: its driver's only one
	Transfer   []byte `json:"transfer"`           // number that it was given away under, 16 bytes
	Blob       []byte `json:"blob"`
}

// The lines of a file: each has one of the fields.
type line struct {
	Header  *headerLine  `json:"header,omitempty"`
	Record  *recordLine  `json:"record,omitempty"`
	Blob    *Blob        `json:"blob,omitempty"`
	Trailer *trailerLine `json:"trailer,omitempty"`
}

type headerLine struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
	Header
}

type trailerLine struct {
	api.BackupReport
	Lines  int    `json:"lines"`  // before this one
	SHA256 string `json:"sha256"` // of them, with their line feeds
}

// ParseRecipients reads X25519 recipients, at least one: age1... A fault names the
// recipient, unless it is a secret key, which a person has given in its place.
func ParseRecipients(texts []string) ([]age.Recipient, error) {
	if len(texts) == 0 {
		return nil, errors.New("a backup needs a recipient (age1…), whose identity will be able to open it; age-keygen makes one")
	}
	var out []age.Recipient
	for i, text := range texts {
		if strings.HasPrefix(strings.ToUpper(text), "AGE-SECRET-KEY-") {
			return nil, fmt.Errorf("recipient %d is an identity, which is secret: give its public half (age1…), and make a new one if others may have seen this one", i+1)
		}
		r, err := age.ParseX25519Recipient(text)
		if err != nil {
			return nil, fmt.Errorf("recipient %q: %w", text, err)
		}
		out = append(out, r)
	}
	return out, nil
}
