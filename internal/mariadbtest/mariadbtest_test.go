package mariadbtest_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kmsd/internal/leaktest"
	"kmsd/internal/mariadbtest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// limit is far more than a start or an end takes.
const limit = 2 * time.Minute

func start(t *testing.T, s *mariadbtest.Server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
}

func insert(t *testing.T, s *mariadbtest.Server, n int) {
	t.Helper()
	if _, err := s.DB().ExecContext(t.Context(), "INSERT INTO test.t VALUES (?)", n); err != nil {
		t.Fatal(err)
	}
}

func TestTablesOutliveAPoliteAndAnImpoliteEnd(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*limit)
	defer cancel()
	dir := t.TempDir()
	installed := filepath.Join(dir, "installed")
	if err := mariadbtest.Install(ctx, installed); err != nil {
		t.Fatal(err)
	}
	s, err := mariadbtest.New(filepath.Join(dir, "server"), installed, "max_connections=42")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(s.Socket()); err == nil {
			t.Errorf("%s is left over", s.Socket())
		}
	}()

	start(t, s)
	for _, stmt := range []string{"CREATE DATABASE test", "CREATE TABLE test.t (n INT PRIMARY KEY)"} {
		if _, err := s.DB().ExecContext(ctx, stmt); err != nil {
			t.Fatal(err)
		}
	}
	insert(t, s, 1)
	if err := s.Start(ctx); err == nil || !strings.Contains(err.Error(), "runs already") {
		t.Errorf("a second start: %v", err)
	}
	if err := s.Stop(ctx); err != nil {
		t.Fatal(err)
	}

	start(t, s)
	insert(t, s, 2)
	s.Kill()
	s.Kill() // of a server that has ended is nothing

	start(t, s)
	var rows, connections int
	if err := s.DB().QueryRowContext(ctx, "SELECT COUNT(*), @@max_connections FROM test.t").Scan(&rows, &connections); err != nil {
		t.Fatal(err)
	}
	if rows != 2 || connections != 42 {
		t.Errorf("%d rows, want 2; max_connections %d, want 42", rows, connections)
	}
}

func TestAStartThatFailsSaysWhatTheServerSaid(t *testing.T) {
	dir := t.TempDir()
	installed := filepath.Join(dir, "installed")
	if err := os.Mkdir(installed, 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := mariadbtest.New(filepath.Join(dir, "server"), installed, "no_such_option=1")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	err = s.Start(ctx)
	if err == nil || !strings.Contains(err.Error(), "exit status") || !strings.Contains(err.Error(), "no_such_option") {
		t.Errorf("got %v; want the exit status and the name of the option", err)
	}
	if s.DB() != nil {
		t.Error("a server that does not run has connections")
	}
}
