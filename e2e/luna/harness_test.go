// Package luna_test answers: do kmsd, its driver and several Luna partitions hold together
// what each of them promises?
//
// The partitions are those of plugins/luna/lunasim; all else is real: processes, signals,
// files, the command line. kmsd and its drivers are built once, without the race detector.
package luna_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/kms/client"
	"kmsd/plugins/luna/lunasim"
)

var (
	bin      string         // folder with the programs; set once, before any test
	template devserver.Env  // of the kmsd whose certificates, tokens and policies every test takes
	dev      string         // folder with them
	sums     map[string]any // :: driver → SHA-256 of its program
)

func TestMain(m *testing.M) {
	// Not below a test's own directory: the paths of sockets have to be short.
	dir, err := os.MkdirTemp("", "kmsd-luna-")
	code := 1
	if err == nil {
		err = prepare(context.Background(), dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		code = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

const (
	startTimeout = 2 * time.Minute // for kmsd to answer
	soon         = 2 * time.Minute // for what has to come by itself
)

// prepare builds the programs, and makes with "kmsd dev" what a server needs beside HSMs.
func prepare(ctx context.Context, dir string) error {
	bin, dev, sums = dir, filepath.Join(dir, "dev"), map[string]any{}
	if err := devserver.Build(ctx, bin, map[string]string{"kmsd-driver-luna": "kmsd/plugins/luna"}); err != nil {
		return err
	}
	for _, driver := range []string{"luna", "softhsm"} {
		b, err := os.ReadFile(filepath.Join(bin, "kmsd-driver-"+driver))
		if err != nil {
			return err
		}
		sum := sha256.Sum256(b)
		sums[driver] = hex.EncodeToString(sum[:])
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	s, err := devserver.Start(ctx, devserver.Config{Bin: bin, Dir: dev, Members: 1, Env: []string{"TMPDIR=" + bin}})
	if err != nil {
		return err
	}
	template = s.Env
	return s.Stop(ctx)
}

// member is one of a site, as it is written down in kmsd.yaml.
type member struct {
	name      string
	driver    string // "" means luna
	pin       string
	settings  map[string]string
	partition *lunasim.Partition // nil for another HSM
}

// site is a kmsd with its members.
type site struct {
	t       *testing.T
	dir     string
	c       *client.Client // tries everything once
	server  *devserver.Server
	members []member
	group   map[string]any // more of the group in kmsd.yaml
	top     map[string]any // more of kmsd.yaml
}

// on makes a member of a partition.
func on(name string, p *lunasim.Partition) member {
	return member{name: name, pin: p.PIN, settings: p.Settings(), partition: p}
}

// start runs kmsd on new partitions, hsm-a and so on, and waits until all are in step.
func start(t *testing.T, partitions ...lunasim.Options) *site {
	t.Helper()
	s := newSite(t)
	for i, o := range partitions {
		s.members = append(s.members, on(fmt.Sprintf("hsm-%c", 'a'+i), lunasim.New(t, o)))
	}
	s.serve()
	s.awaitWhole()
	return s
}

// newSite prepares a kmsd without members.
func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, dir: filepath.Join(t.TempDir(), "kmsd"), group: map[string]any{"recovery": map[string]any{"interval": "1s"}}}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	c, err := template.Client(1)
	if err != nil {
		t.Fatal(err)
	}
	s.c = c
	t.Cleanup(func() {
		s.c.Close()
		if s.server == nil {
			return
		}
		s.server.Kill()
		if t.Failed() {
			b, _ := os.ReadFile(s.server.Log)
			t.Logf("the last that kmsd said:\n%s", b[max(0, len(b)-8000):])
		}
	})
	return s
}

// write writes kmsd.yaml and the PINs: what "kmsd dev" has made, with other members and a
// catalog of its own.
func (s *site) write() {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(dev, "kmsd.yaml"))
	if err != nil {
		s.t.Fatal(err)
	}
	var cfg map[string]any
	if err := yaml.Unmarshal(b, &cfg); err != nil {
		s.t.Fatal(err)
	}
	cfg["catalog"] = map[string]any{"bolt": map[string]any{"path": filepath.Join(s.dir, "catalog.db")}}
	cfg["audit"] = map[string]any{"file": filepath.Join(s.dir, "audit.jsonl")}
	maps.Copy(cfg, s.top)
	group := cfg["groups"].([]any)[0].(map[string]any)
	maps.Copy(group, s.group)
	var entries []any
	for _, m := range s.members {
		entries = append(entries, map[string]any{
			"name": m.name, "driver": m.kind(), "sha256": sums[m.kind()],
			"pin": map[string]any{"file": s.writePIN(m)}, "settings": m.settings,
		})
	}
	group["members"] = entries
	if b, err = yaml.Marshal(cfg); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "kmsd.yaml"), b, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func (m member) kind() string {
	if m.driver == "" {
		return "luna"
	}
	return m.driver
}

// writePIN writes the file with the PIN of a member and returns its path.
func (s *site) writePIN(m member) string {
	s.t.Helper()
	path := filepath.Join(s.dir, m.name+".pin")
	if err := os.WriteFile(path, []byte(m.pin+"\n"), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// serve writes the configuration and runs kmsd on it.
func (s *site) serve() {
	s.t.Helper()
	s.write()
	ctx, cancel := context.WithTimeout(s.t.Context(), startTimeout)
	defer cancel()
	// kmsd's sockets are removed with the programs: one that is killed cannot do it.
	cfg := devserver.Config{Bin: bin, Dir: s.dir, Env: []string{"TMPDIR=" + bin}}
	server, err := devserver.Serve(ctx, cfg, template)
	if err != nil {
		s.t.Fatal(err)
	}
	s.server = server
}

// spec is how an operator adds a member to the group.
func (s *site) spec(m member) api.MemberSpec {
	return api.MemberSpec{
		Name: m.name, Driver: m.kind(), SHA256: sums[m.kind()].(string),
		PIN: api.PINSource{File: s.writePIN(m)}, Settings: m.settings,
	}
}

// now is what kmsd says of a member.
func (s *site) now(name string) api.Member {
	s.t.Helper()
	g, err := s.c.Group(s.t.Context(), devserver.DefaultGroup)
	if err != nil {
		s.t.Fatal(err)
	}
	m, err := devserver.Member(g, name)
	if err != nil {
		s.t.Fatal(err)
	}
	return m
}

// await waits until a member is as wanted.
func (s *site) await(name, want string, ok func(api.Member) bool) (m api.Member) {
	s.t.Helper()
	s.poll(func() error {
		if m = s.now(name); !ok(m) {
			return fmt.Errorf("%s is %s and not %s: keys %d, missing %d, %s, %s", name, m.State, want, m.Keys, m.Missing, m.CKR, m.Reason)
		}
		return nil
	})
	return m
}

func whole(m api.Member) bool { return m.State == api.MemberActive && m.Missing == 0 }

func failed(m api.Member) bool { return m.State == api.MemberFailed }

func down(m api.Member) bool { return m.State == api.MemberDown }

// poll waits until check returns nil.
func (s *site) poll(check func() error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), soon)
	defer cancel()
	if err := devserver.Poll(ctx, check); err != nil {
		s.t.Fatal(err)
	}
}

// awaitWhole waits until every member is in step and holds every key.
func (s *site) awaitWhole() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), soon)
	defer cancel()
	if _, err := devserver.AwaitWhole(ctx, s.c); err != nil {
		s.t.Fatal(err)
	}
}

// create makes a master key of a type; "" is the default.
func (s *site) create(name, kind string) api.Key {
	s.t.Helper()
	k, err := s.c.CreateMasterKey(s.t.Context(), name, api.KeyOptions{Type: kind})
	if err != nil {
		s.t.Fatalf("creating key %s: %v", name, err)
	}
	return k
}

// works checks that a key wraps and unwraps.
func (s *site) works(key string) {
	s.t.Helper()
	plain := random(32)
	wrapped, err := s.c.Wrap(s.t.Context(), key, plain, nil)
	if err != nil {
		s.t.Fatalf("wrapping with %s: %v", key, err)
	}
	if got, err := s.c.Unwrap(s.t.Context(), key, wrapped, nil); err != nil || !slices.Equal(got, plain) {
		s.t.Fatalf("unwrapping with %s: %v", key, err)
	}
}

// sameKeys checks that all partitions keep the same keys, byte for byte, and returns them. A
// key that was made is on min_copies at once, and on a member that was slow a moment later.
func (s *site) sameKeys(want int) map[string][]byte {
	s.t.Helper()
	s.awaitWhole()
	first := s.members[0].partition.KeyBytes(s.t)
	if len(first) != want {
		s.t.Errorf("%s keeps %d keys, want %d", s.members[0].name, len(first), want)
	}
	for _, m := range s.members[1:] {
		if !maps.EqualFunc(first, m.partition.KeyBytes(s.t), slices.Equal[[]byte]) {
			s.t.Errorf("%s and %s do not keep the same keys", s.members[0].name, m.name)
		}
	}
	return first
}

// cli runs the command line program and returns what it printed and its exit code.
func (s *site) cli(args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	cmd := exec.CommandContext(s.t.Context(), filepath.Join(bin, "kmsd"), args...)
	cmd.Env = []string{"KMSD_ADDR=" + template.Addr, "KMSD_CACERT=" + template.CACert, "KMSD_TOKEN=" + template.Token}
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		s.t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// random returns n random bytes.
func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}
