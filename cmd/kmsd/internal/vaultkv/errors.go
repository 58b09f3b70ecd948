package vaultkv

import (
	"errors"
	"fmt"
	"net/http"

	"kmsd/kms/api"
)

// refusal is an answer other than success. It is certain, and for the client to read.
type refusal struct {
	status int
	code   api.Code // for the audit log
	errors []string // nil: none, which is how Vault says that there is nothing
	data   []byte   // JSON in place of errors, about a version that is deleted
}

// Error makes it one.
func (r *refusal) Error() string { return fmt.Sprintf("%d %v", r.status, r.errors) }

func refuse(status int, code api.Code, message string) *refusal {
	return &refusal{status: status, code: code, errors: []string{message}}
}

func badRequest(format string, args ...any) *refusal {
	return refuse(http.StatusBadRequest, api.CodeBadRequest, fmt.Sprintf(format, args...))
}

func permissionDenied(code api.Code) *refusal {
	return refuse(http.StatusForbidden, code, "permission denied")
}

// casMismatch is the text that clients of Vault look for.
const casMismatch = "check-and-set parameter did not match the current version"

// refusalOf says how a failure is answered; nil: not at all, for it is a fault of kmsd or
// its HSMs, or it is not certain.
func refusalOf(err error) *refusal {
	var r *refusal
	if errors.As(err, &r) {
		return r
	}
	var e *api.Error
	if !errors.As(err, &e) {
		return nil
	}
	switch e.Code {
	case api.CodeNotFound:
		// The mount says that there is a database. A catalog without it may be the wrong
		// one, or its disk may be missing, and that must not pass for the absence of a key.
		if errors.Is(err, api.ErrNoDatabase) {
			return nil
		}
		return &refusal{status: http.StatusNotFound, code: e.Code}
	case api.CodeBadRequest:
		return refuse(http.StatusBadRequest, e.Code, e.Message)
	case api.CodeTooLarge:
		return refuse(http.StatusRequestEntityTooLarge, e.Code, e.Message)
	case api.CodeExists, api.CodeState:
		if errors.Is(err, api.ErrCAS) {
			return refuse(http.StatusBadRequest, e.Code, casMismatch)
		}
		return refuse(http.StatusForbidden, e.Code, e.Message) // somebody has disabled or destroyed it
	case api.CodeDenied, api.CodeUnauthenticated:
		return permissionDenied(e.Code)
	default:
		return nil
	}
}

// codeOf is what the audit log gets to know of a failure.
func codeOf(err error) api.Code {
	var r *refusal
	if errors.As(err, &r) {
		return r.code
	}
	return api.AsError(err).Code
}
