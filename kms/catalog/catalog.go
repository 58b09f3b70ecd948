// Package catalog answers: what do we remember about keys?
//
// HSMs know key bytes; the catalog knows names, versions, states, copies and
// deletions. A returning member is admitted only after the two agree.
//
// A key operation writes its [Intent] first, acts on the HSMs, verifies the
// copies, commits the key and removes the intent in one step, and only then
// answers. After a crash every intent that is left is finished or undone, so a
// half-made key is neither lost nor left behind. A [Tombstone] outlives a destroyed
// version for ever, so that no late copy of it comes back.
//
// A [Member] is what was decided about a member of a group while it ran, and which
// token it was admitted with. The rest is in the configuration.
//
// A [Database] has named data keys, each a [DataKey] with its newest version and an
// [OldVersion] for each of the others: envelopes, never plaintext. A [Job] rewraps them.
//
// [Catalog] gives records their meaning on top of a [Store], which keeps bytes
// with revisions (compare and set). boltcat is the store of a single process.
package catalog

import (
	"slices"
	"time"
)

// Key is the record of a master key.
type Key struct {
	Rev uint64 `json:"-"` // revision this copy was read at; 0: not stored yet

	Name           string        `json:"name"`
	Group          string        `json:"group"`
	Type           string        `json:"type"`
	MinCopies      int           `json:"min_copies"`
	RotationPeriod time.Duration `json:"rotation_period,omitempty"` // nanoseconds; 0: never
	Created        time.Time     `json:"created"`
	Databases      []string      `json:"databases,omitempty"` // whose data keys it wraps, by name
	Versions       []Version     `json:"versions"`            // in the order of their numbers
}

// Newest returns the number of the newest enabled version, which is the one that wraps; 0
// when none is enabled.
func (k Key) Newest() int {
	for _, v := range slices.Backward(k.Versions) {
		if v.State == Enabled {
			return v.Number
		}
	}
	return 0
}

// Version is one generation of a key.
type Version struct {
	Number    int        `json:"number"` // from 1, never reused
	Identity  string     `json:"identity"`
	State     State      `json:"state"`
	Created   time.Time  `json:"created"`
	DestroyAt *time.Time `json:"destroy_at,omitempty"`
	// Before is the state that restore brings back; set with DestroyAt.
	Before     State    `json:"before,omitempty"`
	CheckValue []byte   `json:"check_value"`
	Public     []byte   `json:"public,omitempty"` // DER SubjectPublicKeyInfo
	Copies     []string `json:"copies"`           // members that are known to hold it
}

// State is where a version is in its life. The values are those of the API.
type State string

const (
	Enabled          State = "enabled"
	Disabled         State = "disabled"
	DestroyScheduled State = "destroy_scheduled"
	Destroyed        State = "destroyed"
)

// Intent says that an operation on one identity has begun. While it stands, the
// identity may be on any member, or on none. Its record's ID is the key's name and
// the version's number, so that two operations never make the same version.
type Intent struct {
	Rev uint64 `json:"-"`

	Identity string    `json:"identity"`
	Op       IntentOp  `json:"op"`
	Group    string    `json:"group"`
	Key      string    `json:"key"`
	Version  int       `json:"version"`
	Started  time.Time `json:"started"`
	// Members are those that may come to hold it; none means any of the group.
	Members []string `json:"members,omitempty"`
}

// IntentOp is what an intent is about to do.
type IntentOp string

const (
	// IntentCreate: the identity is being made. Undone by destroying it on every
	// member; the version never existed.
	IntentCreate IntentOp = "create"
)

// Tombstone says that an identity is destroyed for ever, and where that is still
// to be carried out.
type Tombstone struct {
	Rev uint64 `json:"-"`

	Identity  string    `json:"identity"` // the record's ID
	Group     string    `json:"group"`
	Key       string    `json:"key"`
	Version   int       `json:"version"`
	Destroyed time.Time `json:"destroyed"`
	// Pending are the members that may still hold it.
	Pending []string `json:"pending,omitempty"`
}
