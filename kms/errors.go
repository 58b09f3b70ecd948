package kms

import (
	"context"
	"errors"
	"fmt"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/envelope"
	"kmsd/kms/internal/group"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// errClosed is what every call gets after Close.
var errClosed = errors.New("the key management service is closed")

// errNeeded is the cause of the refusal to take a version out of use.
var errNeeded = errors.New("a data key needs the version")

// translate turns what any part of this package has met into the error that its
// user sees. doing names the operation as a gerund and its thing: "wrapping with
// key shop". It is the only place where a class of driver errors, a catalog error or
// a context error gets its code.
//
// That a key does not exist is never among the answers: it is known from the catalog
// alone, and said where the catalog is asked. ErrNotFound is for members here.
func translate(doing string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	e := api.NewError(codeOf(err), fmt.Sprintf("%s: %v", doing, err), err)
	if ckr := pluginproto.CKROf(err); ckr != pluginproto.CKROK {
		e.CKR = pluginproto.CKRName(ckr)
	}
	if m, ok := errors.AsType[*group.MemberError](err); ok {
		e.Member = m.Member
	}
	e.Hint = hintOf(e.Code, err)
	return e
}

func codeOf(err error) api.Code {
	switch {
	case errors.Is(err, errClosed), errors.Is(err, group.ErrClosed):
		return api.CodeUnavailable
	case errors.Is(err, group.ErrLost): // before the deadline, which may be its last failure
		return api.CodeGroupLost
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return api.CodeDeadline
	case errors.Is(err, envelope.ErrFormat):
		return api.CodeCorrupt
	case errors.Is(err, group.ErrNotInStep):
		return api.CodeMemberFailed
	case errors.Is(err, group.ErrUnknownMember):
		return api.CodeNotFound // the group itself knows its members
	case errors.Is(err, group.ErrMemberExists):
		return api.CodeExists
	case errors.Is(err, group.ErrLastActive), errors.Is(err, group.ErrOvertaken):
		return api.CodeState
	case errors.Is(err, catalog.ErrConflict), errors.Is(err, catalog.ErrFull):
		return api.CodeUnavailable
	case errors.Is(err, replica.ErrDifferent):
		return api.CodeInternal
	}
	e, ok := errors.AsType[*pluginproto.Error](err)
	if !ok {
		return api.CodeInternal
	}
	switch e.Class {
	case pluginproto.ClassCaller:
		if e.CKR == pluginproto.CKREncryptedDataInvalid {
			return api.CodeCorrupt
		}
		return api.CodeBadRequest
	default:
		// ClassNotFound too: the catalog knows the key, so a member that does not is
		// no proof that it is absent.
		return api.CodeUnavailable
	}
}

func hintOf(code api.Code, err error) string {
	switch {
	case errors.Is(err, group.ErrLastActive):
		return "bring another member back first, or force it, and nobody will serve"
	case errors.Is(err, group.ErrUnknownMember):
		return "the status of the group names its members"
	case code == api.CodeGroupLost:
		return "the status of the group says of each member why it is away and when it is tried again; nothing has to be restarted"
	case code == api.CodeCorrupt:
		return "the envelope was altered or cut, or the aad is not the one it was wrapped with"
	case code == api.CodeUnavailable && errors.Is(err, catalog.ErrConflict):
		return "somebody else is changing the same key; look at it, then try again"
	case errors.Is(err, catalog.ErrFull):
		return "make room where the catalog is; keys can be used meanwhile, but not made, rotated or destroyed"
	case code == api.CodeUnavailable && pluginproto.ClassOf(err) == pluginproto.ClassNotFound:
		return "the key exists; the members that hold it cannot be asked now"
	case code == api.CodeInternal && errors.Is(err, replica.ErrDifferent):
		return "verify the key to see which members hold another value"
	default:
		return ""
	}
}

func notFound(name string) error {
	return api.NewError(api.CodeNotFound, fmt.Sprintf("there is no key %q", name), nil)
}

func badRequest(format string, args ...any) error {
	return api.NewError(api.CodeBadRequest, fmt.Sprintf(format, args...), nil)
}

func tooLarge(format string, args ...any) error {
	return api.NewError(api.CodeTooLarge, fmt.Sprintf(format, args...), nil)
}

// stateError says what a key's state forbids and how to leave it.
func stateError(hint, format string, args ...any) error {
	e := api.NewError(api.CodeState, fmt.Sprintf(format, args...), nil)
	e.Hint = hint
	return e
}
