package dev

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// initTimeout is for making one token.
const initTimeout = 30 * time.Second

// driver is the path of the driver in a directory.
func driver(dir string) string { return filepath.Join(dir, "kmsd-driver-softhsm") }

// modules are where distributions put the library of SoftHSM.
func modules() []string {
	return []string{
		"/usr/lib/softhsm/libsofthsm2.so",
		"/usr/lib/*/softhsm/libsofthsm2.so",
		"/usr/lib64/softhsm/libsofthsm2.so",
		"/usr/lib64/pkcs11/libsofthsm2.so",
		"/usr/lib/pkcs11/libsofthsm2.so",
		"/usr/local/lib/softhsm/libsofthsm2.so",
		"/opt/homebrew/lib/softhsm/libsofthsm2.so",
	}
}

// checkInstalled says in one message all that has to be there first and is not.
func checkInstalled(driverDir string) error {
	var missing []string
	if _, err := os.Stat(driver(driverDir)); err != nil {
		missing = append(missing, fmt.Sprintf("there is no %s; \"make build\" puts it beside kmsd, and --driver-dir or KMSD_DRIVER_DIR names another place", driver(driverDir)))
	}
	found := false
	for _, pattern := range modules() {
		paths, err := filepath.Glob(pattern)
		found = found || err == nil && len(paths) > 0
	}
	if !found {
		missing = append(missing, "SoftHSM is not installed; on Debian or Ubuntu: sudo apt-get install softhsm2")
	}
	if len(missing) > 0 {
		return errors.New(strings.Join(missing, "\n  "))
	}
	return nil
}

// makeTokens makes the tokens that are missing, and names all that are wanted.
func (s *Site) makeTokens(ctx context.Context) error {
	if err := os.MkdirAll(s.path("tokens"), 0o700); err != nil {
		return err
	}
	n := s.opts.Members
	if n == 0 {
		if n = s.countTokens(); n == 0 {
			n = defaultMembers
		}
	}
	for i := range n {
		name := memberName(i)
		if err := s.makeToken(ctx, name); err != nil {
			return fmt.Errorf("making the token of %s: %w", name, err)
		}
		s.Members = append(s.Members, name)
	}
	return nil
}

func memberName(i int) string { return "hsm-" + string(rune('a'+i)) }

// countTokens counts the tokens that are there without a gap.
func (s *Site) countTokens() int {
	for i := range MaxMembers {
		if _, err := os.Stat(s.path("tokens/" + memberName(i))); err != nil {
			return i
		}
	}
	return MaxMembers
}

// makeToken makes a token in a directory beside its place, and moves it there when
// it is whole: one that a crash left without a PIN is never taken for a token.
func (s *Site) makeToken(ctx context.Context, name string) error {
	for _, file := range []string{name + ".pin", name + ".so-pin"} {
		if err := s.once(file, func() ([]byte, error) { return newPIN(), nil }); err != nil {
			return err
		}
	}
	// The directory may have been moved: its paths are written anew.
	place := s.path("tokens/" + name)
	if err := s.write(name+".conf", softhsmConf(place)); err != nil {
		return err
	}
	if _, err := os.Lstat(place); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	fresh := place + ".new"
	if err := errors.Join(os.RemoveAll(fresh), os.Mkdir(fresh, 0o700)); err != nil {
		return err
	}
	if err := s.write(name+".new.conf", softhsmConf(fresh)); err != nil {
		return err
	}
	defer os.Remove(s.path(name + ".new.conf"))
	if err := s.initToken(ctx, name); err != nil {
		return err
	}
	return os.Rename(fresh, place)
}

func softhsmConf(tokens string) []byte {
	return fmt.Appendf(nil, "directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n", tokens)
}

// initToken lets the driver make a token. The PINs go through a pipe, so that no
// process list shows them.
func (s *Site) initToken(ctx context.Context, name string) error {
	pin, err := os.ReadFile(s.path(name + ".pin"))
	if err != nil {
		return err
	}
	defer clear(pin)
	soPIN, err := os.ReadFile(s.path(name + ".so-pin"))
	if err != nil {
		return err
	}
	defer clear(soPIN)
	request, err := json.Marshal(map[string]string{
		"softhsm_conf": s.path(name + ".new.conf"),
		"label":        name,
		"pin":          string(bytes.TrimSpace(pin)),
		"so_pin":       string(bytes.TrimSpace(soPIN)),
	})
	if err != nil {
		return err
	}
	defer clear(request)
	ctx, cancel := context.WithTimeout(ctx, initTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, driver(s.opts.DriverDir), "init-token")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")} // ours may hold secrets
	cmd.Stdin = bytes.NewReader(request)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("running kmsd-driver-softhsm init-token: %w: %s", err, strings.TrimSpace(said.String()))
	}
	return nil
}
