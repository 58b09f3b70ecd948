package config

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"kmsd/cmd/kmsd/internal/owned"
)

const (
	maxSecret   = 4096             // bytes
	execTimeout = 10 * time.Second // for a program that prints a secret
)

// Secret says where a secret is kept: exactly one of the three.
//
// A file has to belong to root or to kmsd's user and be closed to everybody
// else. A variable is the weakest: it is visible in /proc to kmsd's user for as
// long as kmsd lives. A program is run without a shell, with PATH and HOME as its
// whole environment, and prints the secret within 10 seconds.
//
// One newline at the end of a secret that is text does not belong to it.
type Secret struct {
	File string   `koanf:"file" kind:"path"`
	Env  string   `koanf:"env"`
	Exec []string `koanf:"exec"`

	standIn []byte // for one that has a fault; see [Config.Sound]
}

// source says where the secret is kept, in words that are the same each time.
func (s Secret) source() string {
	switch {
	case s.File != "":
		return "file:" + s.File
	case s.Env != "":
		return "env:" + s.Env
	case len(s.Exec) > 0:
		return "exec:" + strings.Join(s.Exec, "\x00")
	default:
		return ""
	}
}

// read fetches the secret anew. The caller wipes it. Errors never hold it.
func (s Secret) read(ctx context.Context, environ []string) ([]byte, error) {
	var b []byte
	var err error
	switch {
	case s.standIn != nil:
		return bytes.Clone(s.standIn), nil
	case s.File != "":
		b, err = readPrivate(s.File, maxSecret)
	case s.Env != "":
		v, ok := lookup(environ, s.Env)
		if !ok {
			return nil, fmt.Errorf("the variable %s is not set", s.Env)
		}
		b = []byte(v)
	case len(s.Exec) > 0:
		b, err = runSecret(ctx, s.Exec)
	default:
		return nil, errors.New("no secret is configured")
	}
	if err != nil {
		return nil, err
	}
	b = trimNewline(b)
	if len(b) == 0 {
		return nil, errors.New("the secret is empty")
	}
	return b, nil
}

// readPrivate reads a file that nobody else may read. What was checked is what
// is read: the questions go to the open file, not to its name.
func readPrivate(path string, limit int64) ([]byte, error) {
	link, err := os.Lstat(path)
	if err != nil {
		return nil, plain(err)
	}
	if link.Mode()&fs.ModeSymlink != 0 && !owned.ByUs(link) {
		return nil, fmt.Errorf("%s is a symbolic link that belongs to another user", path)
	}
	// Not blocking: a named pipe would hold the caller for ever.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, plain(err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, plain(err)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", path)
	case !owned.ByUs(info):
		return nil, fmt.Errorf("%s belongs to another user; %s", path, owned.Advice(info))
	case info.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("mode %04o lets others at %s; chmod 600 it", info.Mode().Perm(), path)
	case info.Size() > limit:
		return nil, fmt.Errorf("%s is longer than %d bytes", path, limit)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		clear(b)
		return nil, plain(err)
	}
	return b, nil
}

// runSecret runs a program that prints a secret. What it says on stderr is not
// passed on: it may hold anything.
func runSecret(ctx context.Context, argv []string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, execTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")}
	cmd.WaitDelay = time.Second // for grandchildren that hold the pipe
	out := &bounded{buf: make([]byte, 0, maxSecret)}
	cmd.Stdout = out
	err := cmd.Run()
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		clear(out.buf)
		return nil, fmt.Errorf("running %s: no answer within %v: %w", argv[0], execTimeout, ctx.Err())
	case out.over:
		clear(out.buf)
		return nil, fmt.Errorf("running %s: it prints more than %d bytes", argv[0], maxSecret)
	case err != nil:
		clear(out.buf)
		return nil, fmt.Errorf("running %s: %w; run it by hand to see why", argv[0], plain(err))
	}
	return out.buf, nil
}

// bounded keeps what fits and never grows, so that no copy is left behind.
type bounded struct {
	buf  []byte
	over bool
}

func (w *bounded) Write(p []byte) (int, error) {
	n := min(len(p), cap(w.buf)-len(w.buf))
	w.buf = append(w.buf, p[:n]...)
	w.over = w.over || n < len(p)
	return len(p), nil
}

// trimNewline drops one newline from the end of text. Bytes that are not text
// stay as they are: the newline may be a part of a random secret.
func trimNewline(b []byte) []byte {
	t := bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r"))
	if !utf8.Valid(t) || bytes.ContainsFunc(t, unicode.IsControl) {
		return b
	}
	return t
}

// plain shortens "open /x: no such file or directory" to what an operator needs:
// the path once, the reason once.
func plain(err error) error {
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		return fmt.Errorf("%s: %w", pe.Path, pe.Err)
	}
	return err
}

// lookup finds a variable in a list of NAME=value. The last one wins, as in
// package os/exec.
func lookup(environ []string, name string) (string, bool) {
	for i := len(environ) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(environ[i], name+"="); ok {
			return v, true
		}
	}
	return "", false
}
