package supervisor

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"kmsd/pluginproto"
)

// maxText is how much of what a program said on its output an error repeats, in
// bytes: a program that is no driver may say anything.
const maxText = 300

// errProgram marks a failure that stays until somebody installs another program.
var errProgram = errors.New("unusable program")

// check refuses a program that is missing, or not the one that was asked for.
func (s Spec) check() error {
	if len(s.SHA256) == 0 && s.Insecure {
		return nil
	}
	if len(s.SHA256) != sha256.Size {
		return s.failure(fmt.Errorf("%w: the SHA-256 of %s is not given (%d bytes, want %d)", errProgram, s.Path, len(s.SHA256), sha256.Size))
	}
	sum, err := sumOf(s.Path)
	if err != nil {
		return s.failure(err)
	}
	if subtle.ConstantTimeCompare(sum, s.SHA256) != 1 {
		return s.failure(fmt.Errorf("%w: %s has the SHA-256 %x, want %x", errProgram, s.Path, sum, s.SHA256))
	}
	return nil
}

func sumOf(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return nil, err
	}
	return h.Sum(nil), nil
}

// failureOf turns whatever kept a driver from running into a member's failure.
func failureOf(member, program string, err error) error {
	op := fmt.Sprintf("starting driver %s of member %s", program, member)
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%s: %w", op, err)
	}
	e := pluginproto.Errorf(pluginproto.ClassMember, op, "%s", printable(strings.TrimPrefix(err.Error(), errProgram.Error()+": ")))
	e.Permanent = errors.Is(err, errProgram) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)
	return e
}

// printable makes one short line of s.
func printable(s string) string {
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\uFFFD' }), " ")
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "") + "…"
	}
	return s
}
