// Package mariadb_test answers: does an unmodified MariaDB live on kmsd, through all that
// can happen to either?
//
// Every test runs kmsd on real SoftHSM tokens and a real mariadbd with the lines of
// examples/tde/mariadb/kmsd.cnf, and looks at tables, files and logs from outside.
package mariadb_test

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kmsd/internal/devserver"
	"kmsd/internal/mariadbtest"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

// The database behind the mount that "kmsd dev" makes for MariaDB.
const database = "shop"

// bin is the folder with the programs, and installed a data directory without tables; set
// once, before any test.
var bin, installed string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "kmsd-mariadb-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin, installed = dir, filepath.Join(dir, "installed")
	if err := devserver.Build(context.Background(), dir, map[string]string{"mariadb-demo": "kmsd/examples/tde/mariadb"}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := mariadbtest.Install(ctx, installed); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// startTimeout is for kmsd or MariaDB to answer, tokens and files made included. How long that
// takes is not what tests are about.
const startTimeout = 3 * time.Minute

// site is a kmsd and the MariaDB that has its keys there.
type site struct {
	kmsd    *devserver.Server
	c       *client.Client // of the administrator; it never tries again by itself
	mariadb *mariadbtest.Server
}

// start makes a site with keys 1 and 2 and an empty schema "shop", and runs it until the test
// ends. The options are further lines of MariaDB's configuration.
func start(t *testing.T, options ...string) *site {
	t.Helper()
	s := startKmsd(t)
	s.makeKey(t, "1")
	s.makeKey(t, "2")
	s.mariadb = newMariaDB(t, append(s.options(t), options...)...)
	s.startMariaDB(t)
	s.do(t, "CREATE DATABASE shop")
	return s
}

// startKmsd runs "kmsd dev" and waits until every member is active and databases are served.
func startKmsd(t *testing.T) *site {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	server, err := devserver.Start(ctx, devserver.Config{Bin: bin, Dir: filepath.Join(t.TempDir(), "kmsd"), Env: environment()})
	if err != nil {
		t.Fatal(err)
	}
	s := &site{}
	s.take(t, server)
	t.Cleanup(func() {
		s.c.Close()
		s.kmsd.Kill()
		if t.Failed() {
			b, _ := os.ReadFile(s.kmsd.Log)
			t.Logf("the last that kmsd said:\n%s", b[max(0, len(b)-20000):])
		}
	})
	s.awaitWhole(t)
	s.awaitListener(t)
	return s
}

// environment makes kmsd put its sockets where they are removed with the programs: below a
// test's own directory their paths would be too long.
func environment() []string { return []string{"TMPDIR=" + bin} }

// take makes a kmsd that runs the one of the site.
func (s *site) take(t *testing.T, server *devserver.Server) {
	t.Helper()
	c, err := server.Env.Client(1)
	if err != nil {
		t.Fatal(err)
	}
	if s.c != nil {
		s.c.Close()
	}
	s.kmsd, s.c = server, c
}

// options are the lines of the example, with this site's values after them: the last one
// counts. A version is believed to be the newest for a moment only.
func (s *site) options(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "examples", "tde", "mariadb", "kmsd.cnf"))
	if err != nil {
		t.Fatal(err)
	}
	return []string{
		string(b),
		"hashicorp_key_management_vault_url=" + s.kmsd.Env.VaultAddr + "/v1/mariadb",
		"hashicorp_key_management_token=" + s.kmsd.Env.VaultToken,
		"hashicorp_key_management_vault_ca=" + s.kmsd.Env.CACert,
		fmt.Sprintf("hashicorp_key_management_cache_version_timeout=%d", believed.Milliseconds()),
		"lock_wait_timeout=10",
	}
}

// believed is for how long MariaDB takes a version to be the newest without asking.
const believed = 200 * time.Millisecond

// newMariaDB makes a MariaDB that ends with the test, and shows its error log when the test
// failed.
func newMariaDB(t *testing.T, options ...string) *mariadbtest.Server {
	t.Helper()
	m, err := mariadbtest.New(filepath.Join(t.TempDir(), "mariadb"), installed, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the error log of MariaDB:\n%s", m.Log())
		}
	})
	return m
}

func (s *site) startMariaDB(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	if err := s.mariadb.Start(ctx); err != nil {
		t.Fatal(err)
	}
}

func (s *site) restartMariaDB(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	if err := s.mariadb.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	s.startMariaDB(t)
}

// do runs one statement.
func (s *site) do(t *testing.T, stmt string, args ...any) {
	t.Helper()
	do(t, s.mariadb.DB(), stmt, args...)
}

// execer is a pool of connections, or one of them.
type execer interface {
	ExecContext(ctx context.Context, stmt string, args ...any) (sql.Result, error)
}

func do(t *testing.T, on execer, stmt string, args ...any) {
	t.Helper()
	if _, err := on.ExecContext(t.Context(), stmt, args...); err != nil {
		t.Fatalf("%s: %v", stmt, err)
	}
}

// makeKey makes version 1 of a data key that only the HSMs have chosen.
func (s *site) makeKey(t *testing.T, id string) {
	t.Helper()
	if _, err := s.c.PutNamedKey(t.Context(), database, id, api.NamedKeyPut{}); err != nil {
		t.Fatal(err)
	}
}

// rotateKey makes the next version of a data key, and returns its number.
func (s *site) rotateKey(t *testing.T, id string) int {
	t.Helper()
	k, err := s.c.RotateNamedKey(t.Context(), database, id)
	if err != nil {
		t.Fatal(err)
	}
	return k.Version
}

// await fails the test unless check returns nil within the time.
func await(t *testing.T, limit time.Duration, check func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if err := devserver.Poll(ctx, func() error { return check(ctx) }); err != nil {
		t.Fatalf("within %v: %v", limit, err)
	}
}

// recoveredIn is far more than a group of SoftHSM tokens takes to be whole again.
const recoveredIn = 2 * time.Minute

// awaitWhole waits until every member is active with every key.
func (s *site) awaitWhole(t *testing.T) api.Group {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), recoveredIn)
	defer cancel()
	g, err := devserver.AwaitWhole(ctx, s.c)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// complaints are what MariaDB's error log says when a key was not to be had or a page could
// not be read.
var complaints = []string{"Key not found", "server error", "corrupt", "Corrupt", "decrypt", "missing key", "[ERROR]"}

// hasNoComplaint checks what the error log has said since it said before.
func (s *site) hasNoComplaint(t *testing.T, before string) {
	t.Helper()
	for line := range strings.Lines(strings.TrimPrefix(s.mariadb.Log(), before)) {
		for _, c := range complaints {
			if strings.Contains(line, c) {
				t.Errorf("MariaDB says: %s", line)
				break
			}
		}
	}
}
