package app_test

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"kmsd/cmd/kmsd/internal/app"
	"kmsd/cmd/kmsd/internal/audit"
	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/kms/api/apitest"
)

// TestMain makes kmsd a command of the scripts: it is this test binary. So is
// dumpable, which runs kmsd and tells what the kernel would give away, before and after.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"kmsd": func() {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			code := app.Main(ctx, os.Args[1:], app.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr})
			stop()
			os.Exit(code)
		},
		"dumpable": func() {
			tellDumpable()
			app.Main(context.Background(), os.Args[1:], app.Streams{In: tellingReader{}, Out: io.Discard, Err: io.Discard})
		},
	})
}

func tellDumpable() {
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	limits, readErr := os.ReadFile("/proc/self/limits")
	fmt.Println("dumpable", dumpable, errors.Join(err, readErr))
	for line := range strings.Lines(string(limits)) {
		if strings.HasPrefix(line, "Max core file size") {
			fmt.Println(strings.Join(strings.Fields(line), " "))
		}
	}
}

// tellingReader is an input that tells what it is like when somebody reads it.
type tellingReader struct{}

func (tellingReader) Read([]byte) (int, error) {
	tellDumpable()
	return 0, io.EOF
}

// TestScripts runs testdata/script/*.txtar: the command line as its users know it,
// against the HTTP API over keys in memory.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("KMSD_TOKEN", adminToken)
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("GORACE", "atexit_sleep_ms=0") // else each run ends with a second of nothing
			return startServers(env)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exitcode": exitCode,
			"audited":  writeAudit,
			"backedup": writeBackup,
		},
	})
}

const (
	adminToken  = "token-of-admin"
	nobodyToken = "token-of-nobody"
)

// startServers serves two APIs over TLS, for one script: KMSD_ADDR has a group that has
// lost a member, and HEALTHY one with a single member that is well.
func startServers(env *testscript.Env) error {
	for name, svc := range map[string]httpapi.Service{"KMSD_ADDR": &members{}, "HEALTHY": &apitest.Memory{}} {
		handler, err := httpapi.New(httpapi.Config{Service: svc, Auth: guard{}, Audit: silent{}})
		if err != nil {
			return err
		}
		srv := httptest.NewUnstartedServer(handler)
		srv.Config.RegisterOnShutdown(handler.Close)
		srv.StartTLS()
		env.Defer(func() { handler.Close(); srv.Close() })
		env.Setenv(name, srv.URL)
		ca := filepath.Join(env.WorkDir, "ca.pem") // the same for all of httptest
		block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
		if err := os.WriteFile(ca, block, 0o600); err != nil {
			return err
		}
		env.Setenv("KMSD_CACERT", ca)
	}
	return nil
}

// guard knows an administrator, and somebody who may do nothing.
type guard struct{}

func (guard) Authenticate(_ context.Context, cr httpapi.Credentials) (httpapi.Caller, error) {
	switch cr.Token {
	case adminToken:
		return caller(true), nil
	case nobodyToken:
		return caller(false), nil
	}
	return nil, errors.New("no valid token or client certificate")
}

type caller bool

func (c caller) Name() string            { return "somebody" }
func (c caller) May(string, string) bool { return bool(c) }

type silent struct{}

func (silent) Record(context.Context, httpapi.Record) error { return nil }

// exitCode is the command "exitcode N PROGRAM ARG...": it wants that exit code.
func exitCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exitcode N PROGRAM ARG...")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	var status interface{ ExitCode() int }
	if errors.As(err, &status) {
		code = status.ExitCode()
	} else if err != nil {
		ts.Fatalf("running %s: %v", args[1], err)
	}
	if fmt.Sprint(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}

// writeAudit is the command "audited FILE": it writes an audit log of two records.
func writeAudit(ts *testscript.TestScript, _ bool, args []string) {
	log, err := audit.Open(ts.MkAbs(args[0]))
	ts.Check(err)
	for _, action := range []string{"wrap", "unwrap"} {
		ts.Check(log.Write(audit.Record{Time: time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC), Principal: "admin", Action: action, Key: "shop", Outcome: "ok"}))
	}
	ts.Check(log.Close())
}

func TestUnixSocketIsAnAddress(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kmsd.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	handler, err := httpapi.New(httpapi.Config{Service: &members{}, Auth: guard{}, Audit: silent{}})
	if err != nil {
		t.Fatal(err)
	}
	srv := httpapi.Server(handler, nil, nil)
	go srv.Serve(l)
	defer srv.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	code := app.Main(t.Context(), []string{"status", "--addr", "unix://" + path, "--token", adminToken}, app.Streams{In: null, Out: null, Err: os.Stderr})
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
}
