package httpapi

import (
	"context"
	"errors"
	"net/http"

	"kmsd/kms/api"
)

// statusOf is the HTTP status of a code, the only place where one is born. The
// codes that say "try again later" are 429 and the 5xx.
func statusOf(c api.Code) int {
	switch c {
	case api.CodeBadRequest:
		return http.StatusBadRequest
	case api.CodeUnauthenticated:
		return http.StatusUnauthorized
	case api.CodeDenied:
		return http.StatusForbidden
	case api.CodeNotFound:
		return http.StatusNotFound
	case api.CodeExists, api.CodeState:
		return http.StatusConflict
	case api.CodeWrongKey, api.CodeCorrupt:
		return http.StatusUnprocessableEntity
	case api.CodeTooLarge:
		return http.StatusRequestEntityTooLarge
	case api.CodeRateLimited:
		return http.StatusTooManyRequests
	case api.CodeMemberFailed:
		return http.StatusBadGateway
	case api.CodeInsufficientCopies, api.CodeGroupLost, api.CodeUnavailable:
		return http.StatusServiceUnavailable
	case api.CodeDeadline:
		return http.StatusGatewayTimeout
	default:
		return http.StatusInternalServerError
	}
}

// errorFor is what the client gets to read of err: a copy, so that an error that
// several requests share keeps clear of their ids. What is not an [api.Error] is a
// fault of kmsd and tells the client no more than where to look.
func errorFor(err error, requestID string) *api.Error {
	var known *api.Error
	var e api.Error
	switch {
	case errors.As(err, &known):
		e = *known
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		e = *api.NewError(api.CodeDeadline, "the request's time is over", err)
	default:
		e = *api.NewError(api.CodeInternal, "kmsd has failed", err)
		e.Hint = "its log says more under this request_id"
	}
	e.RequestID = requestID
	return &e
}

func badRequest(message string) *api.Error { return api.NewError(api.CodeBadRequest, message, nil) }
