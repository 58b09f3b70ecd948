package api

import "time"

// Status is the truth about everything, from memory.
type Status struct {
	Version string  `json:"version"`
	Groups  []Group `json:"groups"`
	// Jobs have not ended, or were the last of their database and have left something
	// undone. Their Failures are not listed here.
	Jobs []Job `json:"jobs,omitempty"`
	// Error says why the groups could not be asked (client only); they are then the
	// last that were known.
	Error string `json:"error,omitempty"`
}

// GroupState is the state of a group as a whole.
type GroupState string

const (
	GroupNormal         GroupState = "normal"          // every member serves or stands by
	GroupDegraded       GroupState = "degraded"        // two or more serve, some member does not
	GroupSole           GroupState = "sole"            // exactly one serves, of several
	GroupStandbyServing GroupState = "standby_serving" // no active member is left; standbys serve
	GroupLost           GroupState = "lost"            // nobody serves
)

// MemberState is the state of a member.
type MemberState string

const (
	MemberActive   MemberState = "active"   // serves
	MemberStandby  MemberState = "standby"  // in step, serves when no active member is left
	MemberProbing  MemberState = "probing"  // is being reached, or has stopped answering
	MemberSyncing  MemberState = "syncing"  // is brought in step with the catalog
	MemberDraining MemberState = "draining" // finishes what it has, takes nothing new, also over a restart, until somebody ends that
	MemberDown     MemberState = "down"     // away; recovery goes on
	MemberFailed   MemberState = "failed"   // away for good, until Reason is mended
)

// Member roles.
const (
	RoleActive  = "active"
	RoleStandby = "standby"
)

// Group is a group and its members.
type Group struct {
	Name      string     `json:"name"`
	State     GroupState `json:"state"`
	Primary   string     `json:"primary"` // "" when lost
	MinCopies int        `json:"min_copies"`
	Keys      int        `json:"keys"` // living versions in the catalog
	// BelowMinCopies are those of Keys that fewer members than their key's min_copies are
	// known to hold, connected or not; WithoutCopy are those of them that no member is.
	BelowMinCopies int      `json:"below_min_copies"`
	WithoutCopy    int      `json:"without_copy"`
	Members        []Member `json:"members"`

	// WearingOut are keys whose newest version has wrapped half as often as it may, or
	// more. For /metrics; not in JSON.
	WearingOut int `json:"-"`
}

// Member is one HSM of a group.
type Member struct {
	Name             string      `json:"name"`
	Driver           string      `json:"driver"`
	Role             string      `json:"role"`
	State            MemberState `json:"state"`
	CKR              string      `json:"ckr"` // the last failure, CKR_OK when healthy
	Since            time.Time   `json:"since"`
	Reason           string      `json:"reason"`
	InFlight         int         `json:"in_flight"`
	Commands         uint64      `json:"commands"`
	Errors           uint64      `json:"errors"`
	LatencyP50       int64       `json:"latency_p50_us"` // microseconds, of recent commands
	LatencyP99       int64       `json:"latency_p99_us"`
	Keys             int         `json:"keys"`        // known to be on it
	Missing          int         `json:"missing"`     // known to be not on it, but should be
	Foreign          int         `json:"foreign"`     // objects on it that nobody here knows
	Quarantined      int         `json:"quarantined"` // copies with another value; never used, never overwritten
	Sync             *Progress   `json:"sync,omitempty"`
	RecoveryAttempts int         `json:"recovery_attempts"` // since it was lost
	GaveUp           bool        `json:"gave_up"`           // recovery has used up its retries
	NextRecovery     *time.Time  `json:"next_recovery"`
	DriverPID        int         `json:"driver_pid"` // 0 when no process runs
	Token            Token       `json:"token"`

	// For /metrics; not in JSON.
	Latency       Histogram `json:"-"` // of every command since the start
	AttemptsTotal uint64    `json:"-"` // recovery attempts since the start
}

// Progress is how far a long work has come.
type Progress struct {
	Done  int      `json:"done"`
	Total int      `json:"total"`
	Rate  float64  `json:"rate"` // per second
	Left  Duration `json:"left"` // at this rate; 0: not known yet
}

// LatencyBounds are the upper bounds of the buckets of a [Histogram], in ascending
// order. What takes longer is in none, and in Count only.
var LatencyBounds = [...]time.Duration{ // never written to
	100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second, 20 * time.Second,
}

// Histogram counts answers by their time.
type Histogram struct {
	Buckets [len(LatencyBounds)]uint64 // not cumulative
	Count   uint64
	Sum     time.Duration
}

// Token describes the token of a member, as it says itself.
type Token struct {
	Label        string `json:"label"`
	Serial       string `json:"serial"`
	Manufacturer string `json:"manufacturer"`
	Model        string `json:"model"`
	Firmware     string `json:"firmware"`
	// Facts are what else there is to know of it, at most half a minute old while the member
	// serves: room left, what its firmware lacks. They differ from one kind of HSM to another.
	Facts []Fact `json:"facts,omitempty"`
}

// Fact is one thing to know of a token.
type Fact struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	// Warning says that somebody has to act before it becomes a failure.
	Warning bool `json:"warning"`
}

// EventDropped is the type of the event that a reader gets in place of those that
// it was too slow for. Its cause says how many.
const EventDropped = "dropped"

// The types of events.
const (
	EventMember   = "member"   // a member's state changed, or it joined or left
	EventGroup    = "group"    // a group's state changed
	EventRecovery = "recovery" // an attempt to bring a member back ended, or was given up
	EventSync     = "sync"     // a member is being brought in step; see Progress
	EventKey      = "key"      // something was done to a key
	EventFact     = "fact"     // a fact of a member's token has become a FactWarning, or is FactMended
	EventJob      = "job"      // a job began, has come further or ended; To is its state, see Progress
)

// Where an EventSync with Progress says that the work is.
const (
	SyncUnderWay = "syncing"
	SyncDone     = "synced"
	SyncBroken   = "broken_off" // the next attempt does the rest
)

// What has become of the fact of an EventFact; its cause has the fact's name and value.
const (
	FactWarning = "warning" // somebody has to act before it becomes a failure
	FactMended  = "mended"  // it is no warning any more
)

// Event is something that happened to a group, a member or a key.
type Event struct {
	Time   time.Time `json:"time"`
	Type   string    `json:"type"` // EventMember, ..., or EventDropped
	Group  string    `json:"group,omitempty"`
	Member string    `json:"member,omitempty"`
	Key    string    `json:"key,omitempty"`
	// Database and Job say which job of which database an EventJob is about.
	Database string `json:"database,omitempty"`
	Job      string `json:"job,omitempty"`
	From     string `json:"from,omitempty"` // the state before
	To       string `json:"to,omitempty"`   // the state after, or what was done to a key
	CKR      string `json:"ckr,omitempty"`
	Cause    string `json:"cause,omitempty"`
	// Alarm is set when it will not mend by itself: somebody has to do something.
	Alarm    bool      `json:"alarm,omitempty"`
	Progress *Progress `json:"progress,omitempty"`
}

// Readiness says whether keys can be used right now, and where. It comes from
// memory and never waits for an HSM.
type Readiness struct {
	// Ready is true when a wrap and unwrap round trip succeeded on at least one
	// member in the last few seconds.
	Ready   bool              `json:"ready"`
	Members []MemberReadiness `json:"members"`
}

// MemberReadiness is the last round trip on one member.
type MemberReadiness struct {
	Group  string    `json:"group"`
	Member string    `json:"member"`
	OK     bool      `json:"ok"`
	Last   time.Time `json:"last,omitzero"` // when a round trip last succeeded; zero: never yet
}
