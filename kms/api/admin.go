package api

import "context"

// Admin is what an operator can do with groups and their members while they serve.
// All methods may be called concurrently. Every error is an [*Error]. A context
// without a deadline gets one of 30 seconds, but for Sync, which takes as long as
// its keys need.
type Admin interface {
	// Recover makes an attempt to bring a member back now and returns how it ended. Any
	// number of calls, and the attempts that are made anyway, share one attempt.
	Recover(ctx context.Context, group, member string) error

	// AddMember takes a member into a group. It returns when the member has passed the
	// join check and is in step; when it does not, the group is as it was, and the
	// error says what differs. A member with that name is CodeExists.
	AddMember(ctx context.Context, group string, spec MemberSpec) (Member, error)

	// RemoveMember drains a member, waits for what it has in flight and forgets it; its
	// token keeps its keys. The last active member, and one whose loss would leave a key
	// without a copy, is CodeState unless force is set.
	RemoveMember(ctx context.Context, group, member string, force bool) error

	// ReplaceMember accepts another token under the name of a member: one that was
	// re-initialised, or, with a spec, another HSM. It is checked as a new one is.
	ReplaceMember(ctx context.Context, group, member string, spec *MemberSpec) (Member, error)

	// SetRole makes a member RoleActive or RoleStandby, and ends a drain. Making a
	// standby of the last active member is CodeState unless force is set.
	SetRole(ctx context.Context, group, member, role string, force bool) (Member, error)

	// Drain lets a member finish what it has and gives it nothing new, until SetRole or
	// Recover ends that. It returns when nothing is in flight any more. The last active
	// member is CodeState unless force is set.
	Drain(ctx context.Context, group, member string, force bool) (Member, error)

	// Sync compares every member in step with the catalog, past all caches, and mends
	// what differs, as at a recovery.
	Sync(ctx context.Context, group string, opts SyncOptions) (SyncReport, error)

	// Reinitialize makes an attempt now to bring back every member that is away, also
	// those that recovery has given up or that are failed, and returns the group as it
	// is after that.
	Reinitialize(ctx context.Context, group string) (Group, error)

	// Check asks every member whether it still fits the group, with a canary key that is
	// cloned to it and destroyed again, and changes nothing.
	Check(ctx context.Context, group string) (GroupCheck, error)

	// Log returns the last events of groups and members that this kmsd remembers, oldest
	// first, at most last of them; 0 means all.
	Log(ctx context.Context, last int) ([]Event, error)
}

// MemberSpec describes a member that joins at run time.
type MemberSpec struct {
	Name     string            `json:"name"`
	Driver   string            `json:"driver"`
	SHA256   string            `json:"sha256,omitempty"` // of the driver program, hexadecimal; "" means that of the configuration
	Standby  bool              `json:"standby,omitempty"`
	PIN      PINSource         `json:"pin"`
	Settings map[string]string `json:"settings,omitempty"`
}

// PINSource says where kmsd reads a member's PIN. A PIN itself never travels.
type PINSource struct {
	File string `json:"file"` // path on the host of kmsd
}

// RoleBody changes the role of a member.
type RoleBody struct {
	Role string `json:"role"` // RoleActive or RoleStandby
}

// SyncOptions choose what Sync does besides. The zero value only mends.
type SyncOptions struct {
	// Adopt makes master keys of the objects that nobody here knows, where that is
	// possible: the label becomes the name.
	Adopt bool `json:"adopt,omitempty"`
}

// SyncReport is how Sync found every member that was in step, and what it did.
type SyncReport struct {
	Group   string       `json:"group"`
	Members []MemberSync `json:"members"`
	Adopted []string     `json:"adopted,omitempty"` // names of new master keys
}

// MemberSync is one member's part of a SyncReport.
type MemberSync struct {
	Member      string   `json:"member"`
	Held        int      `json:"held"`      // key versions that it holds now
	Cloned      int      `json:"cloned"`    // of them, those that were missing
	Changed     int      `json:"changed"`   // of them, those whose attributes were set right
	Destroyed   int      `json:"destroyed"` // keys that should have been gone
	Missing     int      `json:"missing"`   // key versions that nobody connected could supply
	Quarantined []string `json:"quarantined,omitempty"`
	Foreign     []Object `json:"foreign,omitempty"` // objects that nobody here knows; left alone
	Error       string   `json:"error,omitempty"`
}

// Object is a key on a token that the catalog does not know.
type Object struct {
	Identity   string `json:"identity"` // CKA_ID, hexadecimal
	Label      string `json:"label"`
	Type       string `json:"type"`
	CheckValue string `json:"check_value"`
	// Refused says why it was not adopted; "" when it was or nobody asked.
	Refused string `json:"refused,omitempty"`
}

// GroupCheck is what Check has found. OK is true when there is no fault; warnings may
// stand.
type GroupCheck struct {
	Group    string    `json:"group"`
	OK       bool      `json:"ok"`
	Findings []Finding `json:"findings"`
}

// Finding is one thing that an operator should know.
type Finding struct {
	Member  string `json:"member"`
	Fault   bool   `json:"fault"` // false: a warning
	Message string `json:"message"`
}

// RotateOptions are the choices at a rotation. The zero value is what Rotate does.
type RotateOptions struct {
	// AllowDegraded acknowledges a version on fewer members than the key's MinCopies,
	// at least one.
	AllowDegraded bool `json:"allow_degraded,omitempty"`
}
