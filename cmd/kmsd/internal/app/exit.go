package app

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

// Exit codes. The text of the topic exit-codes says the same to operators.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitUnavailable = 3
	exitDenied      = 4
	exitNotFound    = 5
)

// exitCode turns an error into the exit code of the process.
func exitCode(err error) int {
	var usage *usageError
	var failure *api.Error
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &usage):
		return exitUsage
	case errors.As(err, &failure):
		return exitOf(failure.Code)
	default:
		return exitFailed
	}
}

func exitOf(code api.Code) int {
	switch code {
	case api.CodeBadRequest:
		return exitUsage
	case api.CodeUnauthenticated, api.CodeDenied:
		return exitDenied
	case api.CodeNotFound:
		return exitNotFound
	case api.CodeRateLimited, api.CodeInsufficientCopies, api.CodeGroupLost, api.CodeMemberFailed, api.CodeDeadline, api.CodeUnavailable:
		return exitUnavailable
	default: // exists, state, wrong_key, corrupt, too_large, internal
		return exitFailed
	}
}

const exitTopic = `kmsd ends with one of these codes:

  0  done
  1  failed: the name is taken, the state forbids it, the envelope is corrupt
     or of another key, a check found faults, a rekey left data keys as they
     were, or kmsd itself is at fault
  2  usage: the command line or the request is not well formed
  3  unavailable: nobody answers, the group is lost, too few HSMs can take a
     key, or time is over; the same command may succeed later
  4  denied: no valid token or certificate, or no policy allows it
  5  not found: it is certain that there is no such key, database, group
     or member

Errors are printed on stderr; with -o json as the object that the HTTP API
answers: {"error":{"code":…,"message":…,"retryable":…}}.
`

// afterDev is what most people who read an error have forgotten.
const afterDev = "after kmsd dev: . .kmsd/env.sh"

// inFlags says how to do what a server's hint calls by its name in Go and HTTP.
var inFlags = strings.NewReplacer(
	"force it", "force it (--force)",
	"allow_degraded", "--allow-degraded",
	"made degraded", "made degraded (--allow-degraded)",
)

// printError writes an error once, for a person or for a program.
func (s *session) printError(cmd *cobra.Command, err error) {
	if errors.Is(err, errSilent) {
		return
	}
	var usage *usageError
	if errors.As(err, &usage) && s.output != "json" {
		fmt.Fprintf(s.Err, "kmsd: %s\nUsage: %s\nSee: %s --help\n", err, cmd.UseLine(), cmd.CommandPath())
		return
	}
	var failure *api.Error
	known := errors.As(err, &failure)
	if s.output == "json" {
		switch {
		case usage != nil:
			failure = api.NewError(api.CodeBadRequest, err.Error(), err)
		case !known:
			failure = api.NewError(api.CodeInternal, err.Error(), nil)
		}
		enc := json.NewEncoder(s.Err)
		enc.SetEscapeHTML(false)
		// A stderr that cannot be written has nobody to tell.
		_ = enc.Encode(api.ErrorBody{Error: failure})
		return
	}
	// A message may quote a server, and that a driver.
	fmt.Fprintf(s.Err, "kmsd: %s\n", cleanLines(err.Error()))
	if !known {
		return
	}
	hint := inFlags.Replace(failure.Hint)
	var untrusted *tls.CertificateVerificationError
	switch {
	case failure.Code == api.CodeUnauthenticated: // the server's hint is for those who speak HTTP
		hint = "set KMSD_TOKEN, or --cert and --key; " + afterDev
	case errors.As(err, &untrusted) && strings.Contains(hint, "KMSD_CACERT"):
		hint += " " + afterDev
	}
	for _, line := range []struct{ name, text string }{
		{"code", string(failure.Code)},
		{"hint", hint},
		{"member", failure.Member},
		{"ckr", failure.CKR},
		{"request", failure.RequestID},
	} {
		if line.text != "" {
			fmt.Fprintf(s.Err, "  %-8s %s\n", line.name+":", clean(line.text))
		}
	}
}
