package main

import (
	"bytes"
	"strings"
	"sync"
	"testing"

	"kmsd/internal/drivertest"
	"kmsd/pluginproto"
)

func TestMain(m *testing.M) { drivertest.Main(m, run) }

// journal is what drivers have logged.
type journal struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

func (j *journal) has(text []byte) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return bytes.Contains(j.text.Bytes(), text)
}

// process starts a driver process that ends with the test. Its log goes to logged.
func process(t testing.TB, logged *journal) pluginproto.Driver {
	t.Helper()
	if logged == nil {
		return drivertest.Process(t, nil)
	}
	return drivertest.Process(t, logged)
}

func TestCommandLine(t *testing.T) {
	out, _, code := drivertest.Command(t, nil, "--version")
	if code != 0 || out != "kmsd-driver-luna dev\n" {
		t.Errorf("--version: code %d, %q", code, out)
	}
	for _, args := range [][]string{nil, {"--help"}, {"init-token"}} {
		out, errs, code := drivertest.Command(t, nil, args...)
		if code != 2 || out != "" || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "lunacm") {
			t.Errorf("%v: code %d, %q, %q", args, code, out, errs)
		}
	}
}
