package chaos_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"kmsd/e2e/chaos"
	"kmsd/e2e/look"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

// site is a kmsd with its tokens, drivers and disks, all of which can be hurt.
type site struct {
	dir      string
	env      devserver.Env
	operator *client.Client // tries everything once
	hsms     []*hsm
	catalog  disk
	cfg      look.Config
	t        *testing.T
	load     *load // set before the first fault
	report   report

	filling sync.Mutex // held while the disk of the catalog is full
	leaving sync.Mutex // held while a member is out of the group: min_copies have to stay

	mu     sync.Mutex // guards the rest
	server *devserver.Server
	up     time.Time      // since when it serves, or does so again after nobody could
	yaml   map[string]any // of kmsd.yaml
}

// hsm is a member with all that can go wrong with it.
type hsm struct {
	name   string
	driver string // path of the program
	token  token
	conf   look.Member

	failed bool // in the fault that it suffers; belongs to whom it is hurt by
}

const (
	startTimeout   = 2 * time.Minute // for kmsd to answer, tokens made included
	commandTimeout = 3 * time.Second // so that a member that hangs is soon given up
)

// newSite makes tokens and runs kmsd on them until the test ends; every member is
// active.
func newSite(t *testing.T, driver chaos.Driver, members int, seed uint64) *site {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*startTimeout)
	defer cancel()
	s := &site{dir: filepath.Join(t.TempDir(), "kmsd"), t: t}
	// "kmsd dev" makes what is needed and is not used again, as it would mend the
	// configuration that follows.
	dev, err := devserver.Start(ctx, s.config(members))
	if err != nil {
		t.Fatal(err)
	}
	s.env = dev.Env
	if err := dev.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	s.prepare(driver, members, seed)
	if s.operator, err = s.env.Client(1); err != nil {
		t.Fatal(err)
	}
	if s.server, err = devserver.Serve(ctx, s.config(members), s.env); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.end)
	if _, err := devserver.AwaitWhole(ctx, s.operator); err != nil {
		t.Fatal(err)
	}
	if _, err := s.operator.CreateDatabase(ctx, database, api.DatabaseOptions{Key: masterKey}); err != nil && !errors.Is(err, api.ErrExists) {
		t.Fatal(err)
	}
	return s
}

func (s *site) config(members int) devserver.Config {
	// kmsd's sockets are removed with the programs: one that is killed cannot do it.
	return devserver.Config{Bin: bin, Dir: s.dir, Members: members, Env: []string{"TMPDIR=" + bin}}
}

// end kills kmsd and shows what it said when the test failed.
func (s *site) end() {
	s.operator.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.server.Kill()
	if s.t.Failed() {
		b, _ := os.ReadFile(s.server.Log)
		kept := filepath.Join(os.TempDir(), fmt.Sprintf("kmsd-chaos-%d.log", os.Getpid()))
		if err := os.WriteFile(kept, b, 0o600); err == nil {
			s.t.Logf("what kmsd said is in %s", kept)
		}
	}
}

// prepare gives every member a driver and a token of its own that can be made to fail,
// and the catalog a disk that can.
func (s *site) prepare(driver chaos.Driver, members int, seed uint64) {
	t := s.t
	t.Helper()
	path := filepath.Join(s.dir, "kmsd.yaml")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(b, &s.yaml); err != nil {
		t.Fatal(err)
	}
	s.catalog = newDisk(t, filepath.Join(s.dir, "catalog"))
	catalog := filepath.Join(s.catalog.path, "catalog.db")
	s.yaml["catalog"] = map[string]any{"bolt": map[string]any{"path": catalog}}
	group := s.yaml["groups"].([]any)[0].(map[string]any)
	group["command_timeout"] = commandTimeout.String()
	group["recovery"] = map[string]any{"interval": "1s"}
	for i := range members {
		m := s.entries()[i].(map[string]any)
		s.hsms = append(s.hsms, &hsm{name: m["name"].(string)})
	}
	if driver == chaos.Luna {
		s.useLuna(seed)
	} else {
		s.useSoftHSM(catalog)
	}
	for i, h := range s.hsms {
		name := fmt.Sprintf("chaos-%s-%s", driver, h.name)
		h.driver = filepath.Join(bin, "kmsd-driver-"+name)
		m := s.entries()[i].(map[string]any)
		m["driver"], m["sha256"] = name, copyDriver(t, h.driver)
	}
	if err := s.writeConfig(); err != nil {
		t.Fatal(err)
	}
	if s.cfg, err = look.ReadConfig(path); err != nil {
		t.Fatal(err)
	}
	for i, h := range s.hsms {
		h.conf = s.cfg.Groups[0].Members[i]
	}
}

// entries are the members in kmsd.yaml.
func (s *site) entries() []any {
	return s.yaml["groups"].([]any)[0].(map[string]any)["members"].([]any)
}

func (s *site) setEntries(all []any) {
	s.yaml["groups"].([]any)[0].(map[string]any)["members"] = all
}

// entry is the place of a member in kmsd.yaml, -1 for none.
func (s *site) entry(name string) int {
	return slices.IndexFunc(s.entries(), func(m any) bool { return m.(map[string]any)["name"] == name })
}

func (s *site) writeConfig() error {
	b, err := yaml.Marshal(s.yaml)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.dir, "kmsd.yaml"), b, 0o600)
}

// hup changes kmsd.yaml and has kmsd read it. A kmsd that is started meanwhile reads it
// too.
func (s *site) hup(change func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	if err := s.writeConfig(); err != nil {
		return err
	}
	return syscall.Kill(s.server.PID(), syscall.SIGHUP)
}

// amend changes the entry of a member.
func (s *site) amend(h *hsm, change func(m map[string]any)) error {
	return s.hup(func() { change(s.entries()[s.entry(h.name)].(map[string]any)) })
}

// strike takes out the entry of a member and returns it.
func (s *site) strike(h *hsm) (entry any, err error) {
	err = s.hup(func() {
		i := s.entry(h.name)
		entry = s.entries()[i]
		s.setEntries(slices.Delete(s.entries(), i, i+1))
	})
	return entry, err
}

// enter adds an entry.
func (s *site) enter(entry any) error {
	return s.hup(func() { s.setEntries(append(s.entries(), entry)) })
}

// freeze stops kmsd for a while, as a machine does that swaps or is moved.
func (s *site) freeze(ctx context.Context, d time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.awaitLife(ctx)
	if err := syscall.Kill(s.server.PID(), syscall.SIGSTOP); err != nil {
		return err
	}
	pause(ctx, d)
	s.up = time.Now()
	return syscall.Kill(s.server.PID(), syscall.SIGCONT)
}

// awaitLife lets kmsd serve for a second before nobody can be served again, s.mu held, and
// answer those who have waited for it: on a slow machine a few such faults in a row would
// leave a request no time at all, and nobody promises to answer it then.
func (s *site) awaitLife(ctx context.Context) {
	pause(ctx, time.Until(s.up.Add(time.Second)))
	if s.load != nil {
		s.load.answered(ctx, s.up)
	}
}

// restart kills kmsd and starts it again.
func (s *site) restart(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.awaitLife(ctx)
	s.server.Kill()
	server, err := devserver.Serve(ctx, s.config(len(s.hsms)), s.env)
	if err != nil {
		return err
	}
	s.server, s.up = server, time.Now()
	return nil
}

// now is what kmsd says of a member.
func (s *site) now(ctx context.Context, h *hsm) (api.Member, error) {
	g, err := s.operator.Group(ctx, devserver.DefaultGroup)
	if err != nil {
		return api.Member{}, err
	}
	return devserver.Member(g, h.name)
}

// await waits until a member is as wanted.
func (s *site) await(ctx context.Context, h *hsm, want string, ok func(api.Member) bool) (api.Member, error) {
	var m api.Member
	err := devserver.Poll(ctx, func() (err error) {
		if m, err = s.now(ctx, h); err == nil && !ok(m) {
			err = fmt.Errorf("%s is %s and not %s: keys %d, missing %d, quarantined %d, attempts %d, %s, %s", h.name, m.State, want,
				m.Keys, m.Missing, m.Quarantined, m.RecoveryAttempts, m.CKR, m.Reason)
		}
		return err
	})
	return m, err
}

// whole waits until a member serves with every key, with a driver that has not this
// process ID. It has to return by itself.
func (s *site) whole(ctx context.Context, h *hsm, notPID int) (api.Member, error) {
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	return s.await(ctx, h, "whole", func(m api.Member) bool {
		h.failed = h.failed || m.State == api.MemberFailed
		return m.State == api.MemberActive && m.Missing == 0 && m.Quarantined == 0 && m.DriverPID > 0 && m.DriverPID != notPID
	})
}

// hadFailed says whether one of these members was failed since the last call.
func (s *site) hadFailed(them []int) (failed bool) {
	for _, i := range them {
		failed = failed || s.hsms[i].failed
		s.hsms[i].failed = false
	}
	return failed
}

// pid is the process ID of kmsd.
func (s *site) pid() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.server.PID()
}

// admin repeats what an operator asks for until it is done or refused for good. A member
// that the others cannot do without, as they are away just then, is refused with state.
// The codes are refusals that say that it has been done already.
func (s *site) admin(ctx context.Context, what string, act func(api.Admin) error, already ...api.Code) error {
	a, ok := any(s.operator).(api.Admin)
	if !ok {
		return fmt.Errorf("%s: the client cannot do it", what)
	}
	err := devserver.Poll(ctx, func() error {
		err := act(a)
		if err == nil {
			return nil
		}
		e := api.AsError(err)
		for _, code := range already {
			if e.Code == code {
				return nil
			}
		}
		if !e.Retryable && e.Code != api.CodeState {
			return devserver.Final(fmt.Errorf("%s: %w", e.Code, e))
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// checkValue is one as text.
func checkValue(b []byte) string { return hex.EncodeToString(b) }
