package api

import "errors"

// Code is one of the closed set of failures that a user of kmsd can meet. The
// same set is the HTTP error code, the Go sentinel and the CLI exit code.
type Code string

const (
	CodeBadRequest         Code = "bad_request"
	CodeUnauthenticated    Code = "unauthenticated"
	CodeDenied             Code = "denied"
	CodeNotFound           Code = "not_found"
	CodeExists             Code = "exists"
	CodeState              Code = "state"
	CodeWrongKey           Code = "wrong_key"
	CodeCorrupt            Code = "corrupt"
	CodeTooLarge           Code = "too_large"
	CodeRateLimited        Code = "rate_limited"
	CodeInsufficientCopies Code = "insufficient_copies"
	CodeGroupLost          Code = "group_lost"
	CodeMemberFailed       Code = "member_failed"
	CodeDeadline           Code = "deadline"
	CodeUnavailable        Code = "unavailable"
	CodeInternal           Code = "internal"
)

// Codes returns the whole set.
func Codes() []Code {
	return []Code{
		CodeBadRequest, CodeUnauthenticated, CodeDenied, CodeNotFound, CodeExists, CodeState, CodeWrongKey, CodeCorrupt,
		CodeTooLarge, CodeRateLimited, CodeInsufficientCopies, CodeGroupLost, CodeMemberFailed, CodeDeadline,
		CodeUnavailable, CodeInternal,
	}
}

// The sentinels, for errors.Is. Each matches every Error of its code.
var (
	ErrBadRequest         = &Error{Code: CodeBadRequest}         // the request is not well formed
	ErrUnauthenticated    = &Error{Code: CodeUnauthenticated}    // no valid token or client certificate
	ErrDenied             = &Error{Code: CodeDenied}             // no policy allows it
	ErrNotFound           = &Error{Code: CodeNotFound}           // certain: there is no such thing
	ErrExists             = &Error{Code: CodeExists}             // the name is taken
	ErrState              = &Error{Code: CodeState}              // key disabled, destroyed, or version in use
	ErrWrongKey           = &Error{Code: CodeWrongKey}           // the envelope belongs to another key
	ErrCorrupt            = &Error{Code: CodeCorrupt}            // the envelope or its aad does not authenticate
	ErrTooLarge           = &Error{Code: CodeTooLarge}           // a body or an item is over its limit
	ErrRateLimited        = &Error{Code: CodeRateLimited}        // too many requests; see RetryAfterMS
	ErrInsufficientCopies = &Error{Code: CodeInsufficientCopies} // fewer members than min_copies could take the key
	ErrGroupLost          = &Error{Code: CodeGroupLost}          // no member of the group answers
	ErrMemberFailed       = &Error{Code: CodeMemberFailed}       // one addressed member failed
	ErrDeadline           = &Error{Code: CodeDeadline}           // the request's time is over
	ErrUnavailable        = &Error{Code: CodeUnavailable}        // it cannot be told now; try again
	ErrInternal           = &Error{Code: CodeInternal}           // a fault of kmsd itself
)

// Error is a failure as its user sees it, in Go and in JSON.
type Error struct {
	Code         Code   `json:"code"`
	Message      string `json:"message"`
	Retryable    bool   `json:"retryable"`
	RetryAfterMS int64  `json:"retry_after_ms,omitempty"` // milliseconds; 0 means at will
	CKR          string `json:"ckr,omitempty"`            // the PKCS#11 return value, by name
	Member       string `json:"member,omitempty"`
	RequestID    string `json:"request_id,omitempty"`
	Hint         string `json:"hint,omitempty"` // what to do about it

	cause error
}

// Error returns the message, or the code when there is none.
func (e *Error) Error() string {
	if e.Message == "" {
		return string(e.Code)
	}
	return e.Message
}

// Is makes errors.Is compare by code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// Unwrap returns what caused it, if that is known in this process.
func (e *Error) Unwrap() error { return e.cause }

// NewError returns an Error of code with a message and, optionally, a cause. The
// message is what a user reads; the cause is for errors.As and is not sent.
func NewError(code Code, message string, cause error) *Error {
	return &Error{Code: code, Message: message, Retryable: retryable(code), cause: cause}
}

// AsError returns err as an *Error: itself if it is one, else CodeInternal.
func AsError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return NewError(CodeInternal, err.Error(), err)
}

func retryable(c Code) bool {
	switch c {
	case CodeRateLimited, CodeInsufficientCopies, CodeGroupLost, CodeMemberFailed, CodeDeadline, CodeUnavailable:
		return true
	default:
		return false
	}
}
