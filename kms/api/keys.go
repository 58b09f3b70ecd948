// Package api answers: which words do both ends of kmsd share?
//
// It holds the types of the HTTP API v1, the closed set of errors, and [Service] and
// [Admin], the interfaces that package kms implements over groups of HSMs and package
// client implements over HTTP. Every type is plain data with its JSON names;
// []byte is standard base64 in JSON. Package kms has aliases for what a Go
// program needs, so most programs import only kms or kms/client.
package api

import (
	"context"
	"iter"
	"time"
)

// Service is what a program can do with master keys. All methods may be called
// concurrently. Every error is an [*Error]; compare with errors.Is. A context
// without a deadline gets one of 30 seconds.
type Service interface {
	// CreateMasterKey makes a key with its version 1 on every active member.
	// The name is 1 to 128 characters of a-z A-Z 0-9 . _ -, not starting with a dot
	// or dash.
	CreateMasterKey(ctx context.Context, name string, opts KeyOptions) (Key, error)
	Key(ctx context.Context, name string) (Key, error)
	// Keys lists keys by name. An empty Next means the end.
	Keys(ctx context.Context, opts ListOptions) (KeyPage, error)
	// UpdateKey changes what the key's owner may change.
	UpdateKey(ctx context.Context, name string, up KeyUpdate) (Key, error)
	// Rotate makes the next version and returns its number. Old versions still
	// unwrap.
	Rotate(ctx context.Context, name string) (int, error)
	// RotateWith is Rotate with choices. It returns the version as it was made, with
	// the members that hold it.
	RotateWith(ctx context.Context, name string, opts RotateOptions) (Version, error)
	Disable(ctx context.Context, name string) (Key, error)
	Enable(ctx context.Context, name string) (Key, error)
	// Destroy schedules the destruction of every version after the window, and
	// Restore takes it back. A negative window means the default of 720 hours; zero
	// destroys at once.
	Destroy(ctx context.Context, name string, window time.Duration) (Key, error)
	Restore(ctx context.Context, name string) (Key, error)
	// Verify asks every member, past all caches, for its copy of every version.
	Verify(ctx context.Context, name string) (Verification, error)

	// Wrap encrypts plaintext, 1 byte to 64 KiB, under the newest enabled version.
	// aad is authenticated and must be given again to Unwrap; nil is the same as
	// empty.
	Wrap(ctx context.Context, name string, plaintext, aad []byte) ([]byte, error)
	Unwrap(ctx context.Context, name string, wrapped, aad []byte) ([]byte, error)
	// Rewrap moves an envelope to the newest version; the plaintext never leaves
	// kmsd.
	Rewrap(ctx context.Context, name string, wrapped, aad []byte) ([]byte, error)
	// DataKey makes n random bytes in an HSM, 1 to 1024, and returns them in the
	// clear and wrapped.
	DataKey(ctx context.Context, name string, n int, aad []byte) (DataKey, error)
	// Batch does one operation on up to 1000 items. The results are in the order
	// of the items; an item's failure is in its result, so that the error says only
	// what is wrong with the whole.
	Batch(ctx context.Context, op Op, name string, items []Item) ([]Result, error)

	// Sign signs a digest; VerifySignature returns false, nil for a signature that
	// does not match.
	Sign(ctx context.Context, name string, req SignRequest) (Signature, error)
	VerifySignature(ctx context.Context, name string, req VerifyRequest) (bool, error)
	// Decrypt undoes RSA-OAEP; MAC computes an HMAC.
	Decrypt(ctx context.Context, name string, req DecryptRequest) ([]byte, error)
	MAC(ctx context.Context, name string, req MACRequest) (MAC, error)

	// Random returns n bytes, 1 to 64 KiB, from the random source of an HSM. An
	// empty group means the default one.
	Random(ctx context.Context, group string, n int) ([]byte, error)

	// Status never waits for an HSM.
	Status() Status
	// Events yields what happens from now on, until ctx ends or the loop breaks.
	Events(ctx context.Context) iter.Seq[Event]
	Close() error
}

// KeyOptions are the choices at creation. The zero value is an aes-256 key in the
// default group with the group's min_copies.
type KeyOptions struct {
	Group string `json:"group,omitempty"`
	Type  string `json:"type,omitempty"` // "" means aes-256
	// MinCopies is how many members must hold a new version before it is
	// acknowledged; 0 means the group's own.
	MinCopies int `json:"min_copies,omitempty"`
	// AllowDegraded acknowledges a key on fewer members than MinCopies, at least one.
	AllowDegraded bool `json:"allow_degraded,omitempty"`
	// RotationPeriod makes a new version by itself after this long; 0 means never.
	RotationPeriod Duration `json:"rotation_period,omitzero"`
}

// KeyUpdate changes a key. A nil field stays as it is.
type KeyUpdate struct {
	MinCopies      *int      `json:"min_copies,omitempty"`
	RotationPeriod *Duration `json:"rotation_period,omitempty"`
}

// State is where a key or a version is in its life.
type State string

const (
	StateEnabled          State = "enabled"
	StateDisabled         State = "disabled"
	StateDestroyScheduled State = "destroy_scheduled"
	StateDestroyed        State = "destroyed"
)

// Key is a master key.
type Key struct {
	Name           string     `json:"name"`
	Group          string     `json:"group"`
	Type           string     `json:"type"`
	State          State      `json:"state"`
	Primary        int        `json:"primary_version"` // the version that wraps; 0 when none does
	MinCopies      int        `json:"min_copies"`
	RotationPeriod Duration   `json:"rotation_period,omitzero"`
	Created        time.Time  `json:"created"`
	DestroyAt      *time.Time `json:"destroy_at,omitempty"`
	Databases      []string   `json:"databases,omitempty"` // whose data keys it wraps
	Versions       []Version  `json:"versions"`
}

// Version is one generation of a key. Numbers count up from 1 and are never used
// again.
type Version struct {
	Number     int        `json:"version"`
	State      State      `json:"state"`
	Created    time.Time  `json:"created"`
	DestroyAt  *time.Time `json:"destroy_at,omitempty"`
	CheckValue string     `json:"check_value"`          // hexadecimal
	PublicKey  []byte     `json:"public_key,omitempty"` // DER SubjectPublicKeyInfo
	Copies     []string   `json:"copies"`               // members known to hold it
	// Wraps is at least how often it has wrapped; 0 for a version that cannot. A version
	// is replaced by itself before 2^32 (NIST SP 800-38D, section 8.3).
	Wraps uint64 `json:"wraps,omitempty"`
}

// ListOptions choose a page of keys. The zero value is the first 100.
type ListOptions struct {
	Prefix string
	After  string // the Next of the page before
	Limit  int    // 1 to 1000; 0 means 100
}

// KeyPage is a page of keys, by name.
type KeyPage struct {
	Keys []Key  `json:"keys"`
	Next string `json:"next,omitempty"`
}

// Verification is what every member says of every version, asked just now.
type Verification struct {
	Name string `json:"name"`
	// OK is true when every member of the group holds every living version with
	// the catalog's check value.
	OK     bool   `json:"ok"`
	Copies []Copy `json:"copies"`
}

// Copy is one version on one member.
type Copy struct {
	Version    int    `json:"version"`
	Member     string `json:"member"`
	State      string `json:"state"` // "ok", "missing", "different", "unknown"
	CheckValue string `json:"check_value,omitempty"`
	Error      string `json:"error,omitempty"` // why it is unknown
}

// DataKey is a key for data, in the clear and wrapped.
type DataKey struct {
	Plaintext []byte `json:"plaintext,omitempty"`
	Wrapped   []byte `json:"wrapped"`
	Version   int    `json:"version"`
}

// Op is an operation that Batch can do.
type Op string

const (
	OpWrap    Op = "wrap"
	OpUnwrap  Op = "unwrap"
	OpRewrap  Op = "rewrap"
	OpDataKey Op = "datakey"
)

// Item is one element of a batch. On the wire it is the body of a single wrap,
// unwrap or rewrap too; a datakey has a body of its own, [DataKeyBody].
type Item struct {
	Plaintext []byte `json:"plaintext,omitempty"` // wrap
	Wrapped   []byte `json:"wrapped,omitempty"`   // unwrap, rewrap
	AAD       []byte `json:"aad,omitempty"`

	Bytes       int  `json:"-"` // datakey: how many; 0 means 32
	WrappedOnly bool `json:"-"` // datakey: leave the plaintext out of the result
}

// DataKeyBody is a datakey item on the wire.
type DataKeyBody struct {
	Bytes     int    `json:"bytes,omitempty"`
	AAD       []byte `json:"aad,omitempty"`
	Plaintext *bool  `json:"plaintext,omitempty"` // nil means true
}

// Result is one element of a batch's answer, and the body of a single answer.
type Result struct {
	Plaintext []byte `json:"plaintext,omitempty"`
	Wrapped   []byte `json:"wrapped,omitempty"`
	Version   int    `json:"version,omitempty"`
	Error     *Error `json:"error,omitempty"`
}

// SignRequest asks for a signature of a digest.
type SignRequest struct {
	Digest []byte `json:"digest"`
	Hash   string `json:"hash,omitempty"` // sha-256 (default), sha-384, sha-512
	// Padding is for RSA: pss (default) or pkcs1v15.
	Padding string `json:"padding,omitempty"`
}

// Signature is a signature and the version that made it. ECDSA signatures are DER.
type Signature struct {
	Signature []byte `json:"signature"`
	Version   int    `json:"version"`
}

// VerifyRequest asks whether a signature matches.
type VerifyRequest struct {
	SignRequest
	Signature []byte `json:"signature"`
	Version   int    `json:"version,omitempty"` // 0 means the newest
}

// DecryptRequest asks for an RSA-OAEP decryption.
type DecryptRequest struct {
	Ciphertext []byte `json:"ciphertext"`
	Hash       string `json:"hash,omitempty"`
	Version    int    `json:"version,omitempty"` // 0 means the newest
}

// MACRequest asks for an HMAC of a message of up to 64 KiB.
type MACRequest struct {
	Message []byte `json:"message"`
	Version int    `json:"version,omitempty"` // 0 means the newest
}

// MAC is an HMAC and the version that made it.
type MAC struct {
	MAC     []byte `json:"mac"`
	Version int    `json:"version"`
}

// Duration is a time.Duration that is text ("720h") in JSON.
type Duration time.Duration

// MarshalText writes the duration as time.Duration does.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads what time.ParseDuration reads.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}
