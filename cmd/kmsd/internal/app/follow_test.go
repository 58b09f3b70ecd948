package app_test

import (
	"bufio"
	"context"
	"encoding/pem"
	"errors"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/app"
	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
)

// reading runs kmsd against svc and returns its output, line by line, and what ends
// it as a signal does.
func reading(t *testing.T, svc httpapi.Service, args ...string) (lines *bufio.Scanner, interrupt func(), code <-chan int) {
	t.Helper()
	args = serving(t, svc, args...)
	ctx, cancel := context.WithCancel(t.Context())
	out, in := io.Pipe()
	ended := make(chan int, 1)
	go func() {
		ended <- app.Main(ctx, args, app.Streams{In: strings.NewReader(""), Out: in, Err: io.Discard})
		in.Close()
	}()
	t.Cleanup(func() { cancel(); out.Close() })
	return bufio.NewScanner(out), cancel, ended
}

// serving serves svc until the test ends, and returns the arguments of a command that
// asks it.
func serving(t *testing.T, svc httpapi.Service, args ...string) []string {
	t.Helper()
	handler, err := httpapi.New(httpapi.Config{Service: svc, Auth: guard{}, Audit: silent{}})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(handler)
	srv.StartTLS()
	t.Cleanup(func() { handler.Close(); srv.Close() })
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	return append(args, "--addr", srv.URL, "--cacert", ca, "--token", adminToken)
}

func TestFollowShowsEventsUntilInterrupted(t *testing.T) {
	svc := &members{}
	lines, interrupt, code := reading(t, svc, "group", "log", "--follow")
	for range 4 { // what the log has
		if !lines.Scan() || !strings.Contains(lines.Text(), "default") {
			t.Fatalf("got %q, want what has happened", lines.Text())
		}
	}
	err := devserver.Poll(t.Context(), func() error { // the log may come before the stream
		if svc.Readers() == 0 {
			return errors.New("nobody listens to events")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := svc.CreateMasterKey(t.Context(), "shop-db", api.KeyOptions{}); err != nil {
		t.Fatal(err)
	}
	if !lines.Scan() || !strings.Contains(lines.Text(), "key  ") || !strings.Contains(lines.Text(), "shop-db") {
		t.Errorf("got %q, want an event of a key", lines.Text())
	}
	interrupt()
	for lines.Scan() {
	}
	if got := <-code; got != 0 {
		t.Errorf("exit code %d, want 0 for an interrupted look", got)
	}
}

func TestWatchShowsTheStatusUntilInterrupted(t *testing.T) {
	lines, interrupt, code := reading(t, &members{}, "status", "--watch", "-o", "json")
	if !lines.Scan() || !strings.Contains(lines.Text(), `"state":"degraded"`) {
		t.Errorf("got %q, want the status", lines.Text())
	}
	interrupt()
	for lines.Scan() {
	}
	if got := <-code; got != 0 {
		t.Errorf("exit code %d, want 0 for an interrupted look", got)
	}
}
