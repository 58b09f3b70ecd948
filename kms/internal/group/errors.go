package group

import (
	"errors"
	"fmt"

	"kmsd/pluginproto"
)

// Errors of a group. Everything else that a call returns is a [*MemberError], or
// the error of a context that ended.
var (
	// ErrLost: no member could serve. errors.As finds a pluginproto.Error in it:
	// CKR_DEVICE_ERROR for those who were there when the last member was lost,
	// CKR_TOKEN_NOT_PRESENT after.
	ErrLost = errors.New("no member of the group can serve")
	// ErrNotInStep: the member that was asked for is not in the group now.
	ErrNotInStep = errors.New("the member is not in step with the group")
	// ErrUnknownMember: no member has that name.
	ErrUnknownMember = errors.New("the group has no such member")
	// ErrLastActive: nobody would be left who serves.
	ErrLastActive = errors.New("it is the last active member of the group")
	// ErrMemberExists: a member has that name already.
	ErrMemberExists = errors.New("the group has a member of that name already")
	// ErrOvertaken: somebody else has changed the member while it was being drained.
	ErrOvertaken = errors.New("somebody else has changed the member meanwhile")
	// ErrBarred: a member's copy of the key is quarantined. It is never used.
	ErrBarred = errors.New("the copy of the key is quarantined")
	// ErrOccupied: a member is still at an earlier change of keys, which takes long.
	ErrOccupied = errors.New("the member is still at an earlier key operation")
	// ErrPassed is returned by a function of [Group.OnPrimary] that is better done on
	// another member.
	ErrPassed = errors.New("it is left to another member")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("the group is closed")
)

// MemberError is what one member answered.
type MemberError struct {
	Member string
	Err    error
}

func (e *MemberError) Error() string { return fmt.Sprintf("member %s: %v", e.Member, e.Err) }

// Unwrap returns the driver's error.
func (e *MemberError) Unwrap() error { return e.Err }

// lostError is ErrLost with its CKR and with what happened last.
type lostError struct {
	group string
	ckr   uint
	last  error // of the last attempt; nil when there was none
}

func (e *lostError) Error() string {
	s := fmt.Sprintf("group %s: %v: %s", e.group, ErrLost, pluginproto.CKRName(e.ckr))
	if e.last != nil {
		s += " (last: " + e.last.Error() + ")"
	}
	return s
}

func (e *lostError) Unwrap() []error {
	errs := []error{ErrLost, &pluginproto.Error{Class: pluginproto.ClassMember, CKR: e.ckr, Op: "choosing a member of group " + e.group}}
	if e.last != nil {
		errs = append(errs, e.last)
	}
	return errs
}
