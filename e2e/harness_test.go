// Package e2e_test answers: does the whole of it hold, with real tokens, real
// processes and real signals?
//
// Every test runs kmsd and its drivers as a user would, on SoftHSM tokens of its
// own, and looks at them from outside: through HTTP, signals, /proc and the files on
// disk. The programs are built once, without the race detector, because some tests
// measure time.
package e2e_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

// bin is the folder with the programs; set once, before any test.
var bin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "kmsd-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	if err := devserver.Build(context.Background(), dir, map[string]string{"tde-demo": "kmsd/examples/tde/demo"}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// startTimeout is for kmsd to answer, tokens made included. How long that takes is not
// what tests are about.
const startTimeout = 2 * time.Minute

// start runs "kmsd dev" in a new directory until the test ends, and waits until
// every member is active.
func start(t *testing.T) *devserver.Server {
	t.Helper()
	s := startIn(t, t.TempDir(), "")
	await(t, recoveredIn, func(ctx context.Context) error {
		_, err := devserver.AwaitWhole(ctx, dial(t, s))
		return err
	})
	return s
}

// startIn runs "kmsd dev" in dir, which may have tokens and keys already.
func startIn(t *testing.T, dir, listen string) *devserver.Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	s, err := devserver.Start(ctx, devserver.Config{Bin: bin, Dir: filepath.Join(dir, "kmsd"), Listen: listen, Env: environment()})
	if err != nil {
		t.Fatal(err)
	}
	endWith(t, s)
	return s
}

// environment makes kmsd put its sockets where they are removed with the programs: a
// kmsd that is killed cannot remove them itself. Below a test's own directory their
// paths would be too long.
func environment() []string { return []string{"TMPDIR=" + bin} }

// serve runs "kmsd serve" on the configuration that s, which has been stopped, has
// left; "kmsd dev" would write it anew.
func serve(t *testing.T, s *devserver.Server) *devserver.Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	s, err := devserver.Serve(ctx, devserver.Config{Bin: bin, Dir: s.Dir, Env: environment()}, s.Env)
	if err != nil {
		t.Fatal(err)
	}
	endWith(t, s)
	return s
}

// endWith ends the server with the test, and shows its log when the test failed.
func endWith(t *testing.T, s *devserver.Server) {
	t.Cleanup(func() {
		s.Kill()
		if t.Failed() {
			b, _ := os.ReadFile(s.Log)
			t.Logf("the last that kmsd said:\n%s", b[max(0, len(b)-20000):])
		}
	})
}

// dial makes a client that never tries again by itself, so that a test sees every
// failure of kmsd.
func dial(t *testing.T, s *devserver.Server) *client.Client {
	t.Helper()
	c, err := s.Env.Client(1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// await fails the test unless f returns nil within the time.
func await(t *testing.T, limit time.Duration, f func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if err := f(ctx); err != nil {
		t.Fatalf("within %v: %v", limit, err)
	}
}

// awaitWhole waits until every member is active with every key, and returns the
// group and how long that took.
func awaitWhole(t *testing.T, c *client.Client, limit time.Duration) (api.Group, time.Duration) {
	t.Helper()
	begin := time.Now()
	var g api.Group
	await(t, limit, func(ctx context.Context) (err error) {
		g, err = devserver.AwaitWhole(ctx, c)
		return err
	})
	return g, time.Since(begin)
}

// awaitMember waits until the member is as wanted.
func awaitMember(t *testing.T, c *client.Client, name string, limit time.Duration, ok func(api.Member) bool) api.Member {
	t.Helper()
	var m api.Member
	await(t, limit, func(ctx context.Context) error {
		return devserver.Poll(ctx, func() error {
			g, err := c.Group(ctx, devserver.DefaultGroup)
			if err != nil {
				return err
			}
			if m, err = devserver.Member(g, name); err != nil {
				return err
			}
			if !ok(m) {
				return fmt.Errorf("member %s is %s, %s, %s, attempts %d", name, m.State, m.CKR, m.Reason, m.RecoveryAttempts)
			}
			return nil
		})
	})
	return m
}

// awaitOthers waits until every member but one is active with every key.
func awaitOthers(t *testing.T, c *client.Client, but string) {
	t.Helper()
	for _, m := range group(t, c).Members {
		if m.Name != but {
			awaitMember(t, c, m.Name, recoveredIn, isActive)
		}
	}
}

func group(t *testing.T, c *client.Client) api.Group {
	t.Helper()
	g, err := c.Group(t.Context(), devserver.DefaultGroup)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func createKey(t *testing.T, c *client.Client, name string) api.Key {
	t.Helper()
	k, err := c.CreateMasterKey(t.Context(), name, api.KeyOptions{})
	if err != nil {
		t.Fatalf("creating key %s: %v", name, err)
	}
	return k
}

func wrap(t *testing.T, c *client.Client, name string, plain, aad []byte) []byte {
	t.Helper()
	wrapped, err := c.Wrap(t.Context(), name, plain, aad)
	if err != nil {
		t.Fatalf("wrapping with %s: %v", name, err)
	}
	return wrapped
}

// random returns n random bytes.
func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// kmsd runs the command line program against s and returns what it printed and its
// exit code.
func kmsd(t *testing.T, s *devserver.Server, stdin string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return runProgram(t, []string{"KMSD_ADDR=" + s.Env.Addr, "KMSD_CACERT=" + s.Env.CACert, "KMSD_TOKEN=" + s.Env.Token}, stdin,
		filepath.Join(bin, "kmsd"), args...)
}
