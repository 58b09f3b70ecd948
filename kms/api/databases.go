package api

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Databases is what a program can do with databases that ask for their data keys by
// name. A database has a master key; each of its data keys has versions, which are kept
// wrapped under the master key, and in the clear only in the answer. All methods may be
// called concurrently. Every error is an [*Error]. A context without a deadline gets
// one of 30 seconds.
//
// A data key's ID is 1 to 255 bytes of any value. That something does not exist
// (ErrNotFound) is said only when it is certain: a fault of an HSM or of the catalog is
// another error. A master key that is disabled, or waits for its destruction, is ErrState.
type Databases interface {
	// CreateDatabase makes a database and, when there is no key of that name, its master
	// key. The name is as that of a key. A key that exists can be the master key of any
	// number of databases if it is an AES key and enabled, and no option says that it
	// should be another than it is: ErrBadRequest. A name that is taken is ErrExists.
	CreateDatabase(ctx context.Context, name string, opts DatabaseOptions) (Database, error)
	Database(ctx context.Context, name string) (Database, error)
	// Databases lists databases by name. An empty Next means the end.
	Databases(ctx context.Context, opts ListOptions) (DatabasePage, error)

	// PutNamedKey makes the first or the next version of a data key, 100,000 at most. The
	// answer has no plaintext; it comes when the version will survive a crash. Versions are
	// numbered from 1 without gaps, whoever puts at the same time. Doing it again makes
	// another version, but for CAS.
	PutNamedKey(ctx context.Context, database, id string, put NamedKeyPut) (NamedKey, error)
	// RotateNamedKey makes the next version of a data key in the random source of an HSM, as
	// long as the newest is. The answer has no plaintext. A data key that does not exist or
	// is deleted is ErrNotFound, and an object, which only its client can make, ErrState.
	RotateNamedKey(ctx context.Context, database, id string) (NamedKey, error)
	// NamedKey returns a version of a data key with its plaintext, which the caller wipes;
	// version 0 is the newest. A deleted version is ErrNotFound whose cause is ErrDeleted.
	NamedKey(ctx context.Context, database, id string, version int) (NamedKey, error)
	// DescribeNamedKey returns the newest version of a data key without its plaintext, deleted
	// or not. It needs no HSM.
	DescribeNamedKey(ctx context.Context, database, id string) (NamedKey, error)
	// NamedKeys lists data keys by ID, without plaintext. It needs no HSM.
	NamedKeys(ctx context.Context, database string, opts ListOptions) (NamedKeyPage, error)
	// DeleteNamedKey marks the newest version of a data key as deleted. It is kept, but given
	// to nobody any more; the next PutNamedKey makes a version after it. Doing it again is no
	// error. A database whose format is FormatMariaDB refuses it: ErrState.
	DeleteNamedKey(ctx context.Context, database, id string) error

	// Rekey makes the next version of a database's master key and begins a job that wraps every
	// version of every data key under it. One job of a database runs at a time: ErrState.
	Rekey(ctx context.Context, database string, opts RekeyOptions) (Job, error)
	// Job returns how far a job is, from memory while it runs.
	Job(ctx context.Context, id string) (Job, error)

	// ChangeVersion does to one version of a master key what the methods of Service do to all.
	// A version that a data key uses can be neither disabled nor destroyed: ErrState.
	ChangeVersion(ctx context.Context, key string, version int, change VersionChange) (Key, error)
}

// DatabaseOptions are the choices for a database. The zero value has a master key of the
// database's own name, as CreateMasterKey makes it by default.
type DatabaseOptions struct {
	// Key is the master key's name; "" means that of the database. It is made when it
	// does not exist, with the options that follow.
	Key string `json:"key,omitempty"`
	KeyOptions
}

// Database is a database whose data keys are kept here.
type Database struct {
	Name string `json:"name"`
	Key  string `json:"key"` // name of the master key
	// Version of the master key that new data keys are wrapped under; 0 when none is enabled.
	Version int       `json:"version"`
	Group   string    `json:"group"`
	Format  string    `json:"format,omitempty"` // that its values must have, from the configuration; FormatMariaDB
	Created time.Time `json:"created"`
	// Keys and Versions count its data keys and all their versions. Not set in lists.
	Keys     int    `json:"keys"`
	Versions int    `json:"versions"`
	Job      string `json:"job,omitempty"` // its last rekey
}

// FormatMariaDB is the format of a database whose data keys MariaDB reads: 16, 24 or 32
// bytes. Any other length ends mariadbd later, when it writes a page.
const FormatMariaDB = "mariadb"

// MariaDBTakes reports whether MariaDB can use a data key of n bytes.
func MariaDBTakes(n int) bool { return n == 16 || n == 24 || n == 32 }

// DatabasePage is a page of databases.
type DatabasePage struct {
	Databases []Database `json:"databases"`
	Next      string     `json:"next,omitempty"` // After of the next page; "" at the end
}

// NamedKeyPut says what the next version of a data key is. The zero value is 32 bytes, or
// as many as the newest version has, from the random source of an HSM.
type NamedKeyPut struct {
	Plaintext []byte `json:"plaintext,omitzero"` // 1 byte to 64 KiB; nil: an HSM makes it
	Bytes     int    `json:"bytes,omitempty"`    // how many an HSM makes, 1 to 1024
	// Object says that Plaintext is a JSON object, as Vault clients store one.
	Object bool `json:"object,omitempty"`
	// CAS is the newest version there must be, 0 for none at all; else ErrState, or
	// ErrExists, whose cause is ErrCAS. Nil: any.
	CAS *int `json:"cas,omitempty"`
}

// Causes of errors that a caller in the same process can tell apart with errors.Is.
var (
	ErrCAS     = errors.New("the newest version is another one")
	ErrDeleted = errors.New("the version is deleted")
	// ErrNoDatabase: what was asked for is not there, and its whole database neither. Where
	// one is expected, that is no news of a data key: the catalog may be another one.
	ErrNoDatabase = errors.New("there is no such database")
)

// NamedKey is a version of a data key.
type NamedKey struct {
	Database string `json:"database"`
	// ID is the data key's; what is not UTF-8 in it shows as U+FFFD, and then Raw has
	// its bytes.
	ID  string `json:"id"`
	Raw []byte `json:"raw,omitempty"`

	Version int        `json:"version"`
	Newest  int        `json:"newest"` // number of the newest version
	Created time.Time  `json:"created"`
	First   time.Time  `json:"first,omitzero"` // when version 1 was made
	Deleted *time.Time `json:"deleted,omitempty"`
	Object  bool       `json:"object,omitempty"` // the plaintext is a JSON object
	Master  int        `json:"master_version"`   // version of the master key that wraps it

	Plaintext []byte `json:"plaintext,omitempty"`
}

// NamedKeyPage is a page of data keys.
type NamedKeyPage struct {
	Keys []NamedKey `json:"keys"`
	Next string     `json:"next,omitempty"` // After of the next page, opaque; "" at the end
}

// RekeyOptions are the choices for a rekey. The zero value leaves old versions of the
// master key enabled.
type RekeyOptions struct {
	// AllowDegraded acknowledges a version on fewer members than the key's MinCopies.
	AllowDegraded bool `json:"allow_degraded,omitempty"`
	// Retire disables or destroys the older versions of the master key at the end, if no
	// data key uses them any more and nothing failed.
	Retire Retire `json:"retire,omitempty"`
}

// Retire is what becomes of the old versions of a master key.
type Retire string

const (
	RetireNone    Retire = ""
	RetireDisable Retire = "disable"
	RetireDestroy Retire = "destroy" // after the default window
)

// JobState is how far a job is.
type JobState string

const (
	JobRunning JobState = "running"
	JobWaiting JobState = "waiting" // it goes on by itself; Reason says what it waits for
	JobDone    JobState = "done"
	JobFailed  JobState = "failed" // Reason says why
)

// Job is a long work that goes on by itself, also after a crash.
type Job struct {
	ID       string     `json:"id"`
	Type     string     `json:"type"` // JobRekey
	Database string     `json:"database"`
	Key      string     `json:"key"`     // name of the master key
	Version  int        `json:"version"` // of the master key that everything is wrapped under at the end
	State    JobState   `json:"state"`
	Reason   string     `json:"reason,omitempty"`
	Started  time.Time  `json:"started"`
	Ended    *time.Time `json:"ended,omitempty"`
	Retire   Retire     `json:"retire,omitempty"`

	Progress Progress     `json:"progress"` // of versions of data keys, those that were Skipped or Failed among them
	Skipped  int          `json:"skipped"`  // were wrapped under Version already
	Failed   int          `json:"failed"`
	Failures []JobFailure `json:"failures,omitempty"` // the first 100
}

// JobRekey is the type of a job that wraps data keys under another version.
const JobRekey = "rekey"

// JobFailure is a version of a data key that could not be rewrapped, and stays as it was.
type JobFailure struct {
	ID      string `json:"id"`
	Raw     []byte `json:"raw,omitempty"`
	Version int    `json:"version"`
	Error   string `json:"error"`
}

// VersionChange is what is done to one version of a master key.
type VersionChange struct {
	Action VersionAction `json:"action"`
	Window time.Duration `json:"-"` // for ActionDestroy, as in Service.Destroy
}

// VersionAction says what is done to a version.
type VersionAction string

const (
	ActionDisable VersionAction = "disable"
	ActionEnable  VersionAction = "enable"
	ActionDestroy VersionAction = "destroy"
	ActionRestore VersionAction = "restore"
)

// MaxNamedKeyID is the longest ID of a data key, in bytes.
const MaxNamedKeyID = 255

// ShowID returns the ID of a data key as text and, when that is not the same bytes, the
// bytes: the ID and Raw of [NamedKey] and [JobFailure].
func ShowID(id string) (text string, raw []byte) {
	text = strings.ToValidUTF8(id, "\uFFFD")
	if text != id {
		raw = []byte(id)
	}
	return text, raw
}

// CheckNamedKeyID returns nil for an ID that a data key can have, else ErrBadRequest.
func CheckNamedKeyID(id string) error {
	if id == "" {
		return NewError(CodeBadRequest, "the data key has no ID", nil)
	}
	if len(id) > MaxNamedKeyID {
		return NewError(CodeBadRequest, fmt.Sprintf("the data key's ID has %d bytes, at most %d are allowed", len(id), MaxNamedKeyID), nil)
	}
	return nil
}
