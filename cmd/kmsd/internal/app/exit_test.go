package app_test

import (
	"testing"

	"kmsd/cmd/kmsd/internal/app"
	"kmsd/kms/api"
)

func TestEveryCodeHasItsExit(t *testing.T) {
	for code, want := range map[api.Code]int{
		api.CodeBadRequest:         2,
		api.CodeUnauthenticated:    4,
		api.CodeDenied:             4,
		api.CodeNotFound:           5,
		api.CodeExists:             1,
		api.CodeState:              1,
		api.CodeWrongKey:           1,
		api.CodeCorrupt:            1,
		api.CodeTooLarge:           1,
		api.CodeRateLimited:        3,
		api.CodeInsufficientCopies: 3,
		api.CodeGroupLost:          3,
		api.CodeMemberFailed:       3,
		api.CodeDeadline:           3,
		api.CodeUnavailable:        3,
		api.CodeInternal:           1,
	} {
		if got := app.ExitOf(code); got != want {
			t.Errorf("%s ends with %d, want %d", code, got, want)
		}
	}
}
