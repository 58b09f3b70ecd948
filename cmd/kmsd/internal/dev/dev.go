// Package dev answers: what does a kmsd for trying out need on disk?
//
// [Prepare] makes a directory with everything that a server needs: certificates,
// a token in SoftHSM for every member with its PIN, a domain secret, an
// administrator's token, and the configuration that names all of it. Each step
// leaves alone what is there, and makes what is missing so that it appears whole
// or not at all; so a directory that was left half made by a crash is finished by
// the next start, and tokens and keys stay the same for ever.
//
// Below the directory:
//
//	kmsd.yaml                        written anew at every start
//	env.sh                           there while a server answers; for a shell to source
//	ca.pem ca.key                    signs the others
//	server.pem .key, client.pem .key
//	domain                           secret that all tokens share
//	admin.token, vault.token         the tokens of env.sh; tokens.yaml has their hashes
//	tokens.yaml policies.yaml        who may do what; edit them and send SIGHUP
//	hsm-a.pin, .so-pin, .conf        of the first HSM, and so on
//	tokens/hsm-a/                    its token
//	catalog.db audit.jsonl
package dev

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"kmsd/cmd/kmsd/internal/auth"
	"kmsd/cmd/kmsd/internal/owned"
)

const defaultMembers = 3

// MaxMembers is how many HSMs there can be: hsm-a to hsm-z.
const MaxMembers = 26

// Options are what Prepare needs. They are copied.
type Options struct {
	Dir       string
	Members   int    // 0 means as many as there are, or 3
	Listen    string // HOST:PORT; port 0 picks a free one
	DriverDir string // of kmsd-driver-softhsm
}

// Site is a directory that is ready to be served. Close it afterwards.
type Site struct {
	Dir     string // absolute
	Config  string // path of kmsd.yaml
	Members []string
	Addr    string // https://HOST:PORT, as clients reach it
	// VaultAddr is the same for databases that take their keys from a Vault.
	VaultAddr string

	// Listeners are open for the addresses in the configuration, so that nobody can
	// take a free port between its choice and its use.
	Listeners map[string]net.Listener

	opts        Options
	vaultListen string   // https://HOST:PORT, as kmsd listens
	lock        *os.File // of the directory, for as long as it is open
}

// Prepare makes or finishes the directory.
func Prepare(ctx context.Context, opts Options) (_ *Site, err error) {
	if opts.Members < 0 || opts.Members > MaxMembers {
		return nil, fmt.Errorf("%d members; 1 to %d can be made", opts.Members, MaxMembers)
	}
	if err := checkInstalled(opts.DriverDir); err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(opts.Dir)
	if err != nil {
		return nil, fmt.Errorf("finding %s: %w", opts.Dir, err)
	}
	if opts.DriverDir, err = filepath.Abs(opts.DriverDir); err != nil {
		return nil, fmt.Errorf("finding %s: %w", opts.DriverDir, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making %s: %w", dir, err)
	}
	if err := checkDir(dir); err != nil {
		return nil, err
	}
	s := &Site{Dir: dir, Config: filepath.Join(dir, "kmsd.yaml"), opts: opts}
	if s.lock, err = lockDir(dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	// Whoever waits for it must not take an earlier server's for this one's.
	if err := os.Remove(s.path("env.sh")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("removing an old env.sh: %w", err)
	}
	if err := s.fill(ctx); err != nil {
		return nil, fmt.Errorf("preparing %s: %w", dir, err)
	}
	return s, nil
}

// fill makes all that is missing.
func (s *Site) fill(ctx context.Context) error {
	if err := s.openListener(); err != nil {
		return err
	}
	if err := s.makeCertificates(); err != nil {
		return err
	}
	if err := s.once("domain", func() ([]byte, error) { return []byte(base64.StdEncoding.EncodeToString(random(32)) + "\n"), nil }); err != nil {
		return err
	}
	if err := s.makePrincipals(); err != nil {
		return err
	}
	if err := s.makeTokens(ctx); err != nil {
		return err
	}
	return s.writeConfig()
}

// openListener takes the address before anything else can.
func (s *Site) openListener() error {
	l, err := net.Listen("tcp", s.opts.Listen)
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%s is in use; --listen 127.0.0.1:0 picks a free port", s.opts.Listen)
	}
	if err != nil {
		return err
	}
	addr := l.Addr().(*net.TCPAddr)
	s.Listeners = map[string]net.Listener{"https://" + addr.String(): l}
	host, _, err := net.SplitHostPort(s.opts.Listen)
	if err != nil {
		return err
	}
	s.Addr = "https://" + net.JoinHostPort(reachable(host, addr.IP), fmt.Sprint(addr.Port))
	return s.chooseVaultAddr(host)
}

// makePrincipals makes the tokens of the administrator and of the database, and the files
// that let them in.
func (s *Site) makePrincipals() error {
	for _, name := range []string{"admin.token", "vault.token"} {
		err := s.once(name, func() ([]byte, error) {
			token, _ := auth.NewToken()
			return []byte(token + "\n"), nil
		})
		if err != nil {
			return err
		}
	}
	if err := s.once("tokens.yaml", s.tokensYAML); err != nil {
		return err
	}
	return s.once("policies.yaml", func() ([]byte, error) { return []byte(policiesYAML), nil })
}

// once makes a private file unless it is there.
func (s *Site) once(name string, content func() ([]byte, error)) error {
	switch _, err := os.Lstat(s.path(name)); {
	case err == nil:
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	b, err := content()
	if err != nil {
		return fmt.Errorf("making %s: %w", name, err)
	}
	defer clear(b)
	return s.write(name, b)
}

// write makes a private file appear whole.
func (s *Site) write(name string, b []byte) error {
	path := s.path(name)
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // in vain after the rename
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func (s *Site) path(name string) string { return filepath.Join(s.Dir, name) }

// Announce writes env.sh, which says that the server answers.
func (s *Site) Announce() error {
	token, err := os.ReadFile(s.path("admin.token"))
	if err != nil {
		return err
	}
	vaultToken, err := os.ReadFile(s.path("vault.token"))
	if err != nil {
		return err
	}
	var b bytes.Buffer
	for _, v := range []struct{ name, value string }{
		{"KMSD_ADDR", s.Addr},
		{"KMSD_CACERT", s.path("ca.pem")},
		{"KMSD_TOKEN", strings.TrimSpace(string(token))},
		{"KMSD_VAULT_ADDR", s.VaultAddr},
		{"KMSD_VAULT_TOKEN", strings.TrimSpace(string(vaultToken))},
	} {
		fmt.Fprintf(&b, "export %s=%s\n", v.name, quote(v.value))
	}
	return s.write("env.sh", b.Bytes())
}

// quote makes one word of a shell, however odd.
func quote(word string) string { return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'" }

// Close ends the claim on the directory. The listeners are closed too, if nobody
// has done it.
func (s *Site) Close() error {
	var errs []error
	for _, l := range s.Listeners {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if err := os.Remove(s.path("env.sh")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(append(errs, s.lock.Close())...)
}

// checkDir refuses a directory in which others could exchange a file for theirs.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("looking at %s: %w", dir, err)
	}
	switch {
	case !owned.ByUs(info):
		return fmt.Errorf("%s belongs to another user; use another --dir", dir)
	case info.Mode().Perm()&0o002 != 0:
		return fmt.Errorf("mode %04o lets anybody change what is in %s; chmod 700 it, or use another --dir", info.Mode().Perm(), dir)
	}
	return nil
}

// lockDir claims a directory for this process; the claim ends with it.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the directory, which has to be yours (or use another --dir): %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("another kmsd dev runs in %s; use it, or another --dir", dir)
		}
		return nil, fmt.Errorf("locking %s: %w", dir, err)
	}
	return f, nil
}
