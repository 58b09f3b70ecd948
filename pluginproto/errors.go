package pluginproto

import (
	"context"
	"errors"
	"fmt"
)

// Class says who has to act on a failure. The set is closed.
type Class uint8

const (
	// ClassUnknown: nobody knows what happened. Never "not found", never retried
	// on the same member.
	ClassUnknown Class = iota
	// ClassCaller: the request itself is wrong and would be on every member.
	ClassCaller
	// ClassNotFound: a logged-in session looked, and the key is not there.
	ClassNotFound
	// ClassBusy: the token is short of sessions or memory for now; the member is
	// healthy.
	ClassBusy
	// ClassMember: this member is no good now; another may be.
	ClassMember
)

func (c Class) String() string {
	switch c {
	case ClassCaller:
		return "caller"
	case ClassNotFound:
		return "not found"
	case ClassBusy:
		return "busy"
	case ClassMember:
		return "member"
	default:
		return "unknown"
	}
}

// CKR values that code outside the PKCS#11 engine needs to name. PKCS#11 2.40,
// section 5.1.6 and pkcs11t.h.
const (
	CKROK                   uint = 0x00
	CKRGeneralError         uint = 0x05
	CKRDeviceError          uint = 0x30
	CKREncryptedDataInvalid uint = 0x40
	CKRPINIncorrect         uint = 0xA0
	CKRPINLocked            uint = 0xA4
	CKRSignatureInvalid     uint = 0xC0
	CKRTokenNotPresent      uint = 0xE0
)

// Error is a failure of one call on one token.
type Error struct {
	Class Class
	// CKR is the PKCS#11 return value behind it; 0 when no library call failed.
	CKR uint
	// Op names what was being done, as a gerund: "logging in to token hsm-a".
	Op string
	// Msg tells the operator what to do, when there is more to say than CKR.
	Msg string
	// Permanent marks a member failure that trying again will not mend: a wrong
	// PIN, a missing module, another domain. Something outside has to change first.
	Permanent bool
}

func (e *Error) Error() string {
	s := e.Op
	if s == "" {
		s = "calling the driver"
	}
	if e.CKR != CKROK {
		s += ": " + CKRName(e.CKR)
	}
	if e.Msg != "" {
		s += ": " + e.Msg
	}
	return s
}

// ClassOf returns the class of an error that came from a Driver. A context that
// ended is ClassCaller: it says nothing about the member.
func ClassOf(err error) Class {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e.Class
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return ClassCaller
	default:
		return ClassUnknown
	}
}

// CKROf returns the PKCS#11 return value behind err, 0 when there is none.
func CKROf(err error) uint {
	if e := (*Error)(nil); errors.As(err, &e) {
		return e.CKR
	}
	return CKROK
}

// Errorf makes an Error without a CKR. The format says what to do about it.
func Errorf(class Class, op, format string, args ...any) *Error {
	return &Error{Class: class, Op: op, Msg: fmt.Sprintf(format, args...)}
}
