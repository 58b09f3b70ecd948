package chaos_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kmsd/e2e/look"
	"kmsd/internal/faultlib"
)

// token is a member's, with all that can go wrong with it. Nobody uses it twice at a
// time, as no member is hurt twice.
type token interface {
	// arm has the library misbehave; disarm ends that, left says how often it will yet
	// happen. There is one fault at a time.
	arm(fault)
	disarm()
	left() int
	// remove takes the token away, in one way or another, until back is called, which may
	// have to be tried again.
	remove(way int) (back func() error, err error)
	// replace puts another token in its place that is alike but for what it holds.
	// Forget ends the old one.
	replace(ctx context.Context) (forget func(), err error)
	// fill leaves no room on it until free is called.
	fill() (free func() error, err error)
}

// fault is what a library does to calls of a function.
type fault struct {
	what         what
	function     string // "*": any
	after, times int
	arg          uint // the answer; milliseconds
}

type what int

const (
	closeSessions what = iota // before the call
	logout                    // before the call
	answer                    // and do not carry out the call
	hang                      // until disarmed
	sleep                     // before the call
	lose                      // carry out the call, and answer
)

// softToken is one of SoftHSM behind a library that can misbehave.
type softToken struct {
	t    *testing.T
	lib  *faultlib.Library
	disk disk
	h    *hsm
}

// useSoftHSM gives every member the token that "kmsd dev" has made for it, on a disk of its
// own. The catalog knows a key that they hold.
func (s *site) useSoftHSM(catalog string) {
	t := s.t
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, "catalog.db"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(catalog, b, 0o600); err != nil {
		t.Fatal(err)
	}
	names := make([]string, len(s.hsms))
	for i := range names {
		names[i] = fmt.Sprintf("library-%d", i)
	}
	libs := faultlib.Build(t, names...)
	for i, h := range s.hsms {
		token := &softToken{t: t, lib: libs[i], disk: newDisk(t, filepath.Join(s.dir, "disk-"+h.name)), h: h}
		settings := s.entries()[i].(map[string]any)["settings"].(map[string]any)
		move(t, filepath.Join(s.dir, "tokens", h.name), token.folder(), settings["softhsm_conf"].(string))
		settings["module"] = libs[i].Path
		h.token = token
	}
}

// folder is where the token is.
func (k *softToken) folder() string { return filepath.Join(k.disk.path, "tokens") }

func (k *softToken) arm(f fault) {
	does := map[what]faultlib.What{
		closeSessions: faultlib.CloseSessions, logout: faultlib.Logout, answer: faultlib.Answer, hang: faultlib.Hang, sleep: faultlib.Sleep,
	}
	k.lib.Arm(k.t, 0, faultlib.Fault{What: does[f.what], Function: f.function, After: uint32(f.after), Times: uint32(f.times), Arg: uint32(f.arg)})
}

func (k *softToken) disarm() { k.lib.Disarm(k.t, 0) }

func (k *softToken) left() int { return k.lib.Left(k.t, 0) }

// remove leaves a place without a token every other time, and not even the place else.
func (k *softToken) remove(way int) (back func() error, err error) {
	away := k.folder() + ".away"
	if err := os.Rename(k.folder(), away); err != nil {
		return nil, err
	}
	if way%2 == 0 {
		if err := os.MkdirAll(k.folder(), 0o700); err != nil {
			return nil, err
		}
	}
	return func() error {
		if err := os.RemoveAll(k.folder()); err != nil { // a driver may have made it anew, and do so again
			return err
		}
		return os.Rename(away, k.folder())
	}, nil
}

func (k *softToken) replace(ctx context.Context) (forget func(), err error) {
	old := k.folder() + ".old"
	if err := os.Rename(k.folder(), old); err != nil {
		return nil, err
	}
	return func() { os.RemoveAll(old) }, k.initToken(ctx)
}

// initToken makes a token with the label and the PIN of the member.
func (k *softToken) initToken(ctx context.Context) error {
	if err := os.MkdirAll(k.folder(), 0o700); err != nil {
		return err
	}
	conf := k.h.conf
	pin, err := look.Secret(conf.PIN.File)
	if err != nil {
		return err
	}
	soPIN, err := look.Secret(strings.TrimSuffix(conf.PIN.File, ".pin") + ".so-pin")
	if err != nil {
		return err
	}
	request, err := json.Marshal(map[string]string{
		"softhsm_conf": conf.Settings["softhsm_conf"], "label": conf.Settings["token_label"],
		"pin": string(pin), "so_pin": string(soPIN),
	})
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "kmsd-driver-softhsm"), "init-token")
	cmd.Stdin = bytes.NewReader(request)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("making a token: %w: %s", err, out)
	}
	return nil
}

func (k *softToken) fill() (free func() error, err error) { return k.disk.fill() }
