package chaos

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"sync"
	"time"

	"kmsd/kms/api"
)

// Op is what a request asked for.
type Op string

const (
	Wrap            Op = "wrap"
	Unwrap          Op = "unwrap"
	Rewrap          Op = "rewrap"
	DataKey         Op = "datakey"
	Sign            Op = "sign"
	VerifySignature Op = "verify-signature"
	Random          Op = "random"

	Create  Op = "create"
	Rotate  Op = "rotate"
	Disable Op = "disable"
	Enable  Op = "enable"
	Destroy Op = "destroy" // at once, without a window
)

// idempotent says whether a client may send it twice.
func (o Op) idempotent() bool {
	switch o {
	case Wrap, Unwrap, Rewrap, DataKey, Sign, VerifySignature, Random, GetNamed:
		return true
	default:
		return false
	}
}

// Digest names bytes that should not be in a history themselves. Empty bytes have
// none.
func Digest(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:12])
}

// Request is one request and how it ended.
type Request struct {
	Op         Op
	Key        string // "" for Random
	Start, End time.Time
	Deadline   time.Time
	// Expired is when this process noticed that the deadline had come: later than
	// Deadline when the machine is busy. Zero: the answer was there before.
	Expired time.Time
	// Hurried: it was given so little time that it may fail for want of it.
	Hurried bool

	// Code is how it failed; "" means that it was acknowledged.
	Code    api.Code
	Message string

	Plain    string   // digest: of what was wrapped, or of what an unwrap returned
	Envelope string   // digest: what a wrap, rewrap or datakey returned, or an unwrap was given
	From     string   // digest: what a rewrap was given
	Version  int      // that was made, or of a data key was read
	Copies   []string // of it: the members that hold it
	Least    int      // of it: how many members had to hold it
	Valid    bool     // what a verify-signature said

	Newest bool // a get-named that asked for the newest version
	Vault  bool // sent once, to the listener for databases, which may give no answer
	Status int  // of its answer; 0: none
}

func (r Request) acknowledged() bool { return r.Code == "" }

// History is what was asked and answered. It may be used concurrently. The zero value
// is empty.
type History struct {
	mu       sync.Mutex // guards requests
	requests []Request
}

// Add takes down a request that has ended.
func (h *History) Add(r Request) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.requests = append(h.requests, r)
}

// Requests returns everything so far, by start.
func (h *History) Requests() []Request {
	h.mu.Lock()
	all := slices.Clone(h.requests)
	h.mu.Unlock()
	slices.SortStableFunc(all, func(a, b Request) int { return a.Start.Compare(b.Start) })
	return all
}

// Stall is a time in which the test itself was not running, as the machine had other
// things to do. It cannot tell when an answer came meanwhile.
type Stall struct{ From, To time.Time }

// Final is what was found at the end, when every fault had been healed: the catalog
// and the tokens were opened past kmsd.
type Final struct {
	Living map[string]string            // of the catalog :: identity → check value
	Gone   map[string]bool              // identities with a tombstone
	Open   []string                     // operations that the catalog has open still, and tombstones that some member has not taken
	Tokens map[string]map[string]string // member → identity → check value of the object
	Known  map[string]bool              // identities on tokens that are nobody's business
	// Bytes are what the keys on a token are, read from where it keeps them: member →
	// identity → digest. Empty where nobody could look.
	Bytes map[string]map[string]string
	// States are what kmsd says of each key.
	States map[string]api.State
	// Unverified are the keys of which kmsd itself says that some copy is not what it
	// should be, and why.
	Unverified map[string]string
	Stalls     []Stall // in any order; they may overlap

	Named  map[string]map[int]Stored // of the catalog :: data key → version → what was found
	Master int                       // version of their master key that the last rekey has made
}
