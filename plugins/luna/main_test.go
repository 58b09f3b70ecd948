package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"

	"kmsd/pluginproto"
)

// The test binary is the driver when it is started with this variable.
const asDriver = "KMSD_TEST_AS_DRIVER"

func TestMain(m *testing.M) {
	if os.Getenv(asDriver) != "" {
		os.Exit(run())
	}
	os.Exit(m.Run())
}

// program is this test binary as the driver, with a clean environment.
func program(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	// The race detector lets a process linger for a second when it ends.
	cmd.Env = []string{asDriver + "=1", "GORACE=atexit_sleep_ms=0"}
	return cmd
}

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
	logger := hclog.NewNullLogger()
	if logged != nil {
		logger = hclog.New(&hclog.LoggerOptions{Output: logged, Level: hclog.Trace})
	}
	p := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  pluginproto.Handshake(),
		Plugins:          plugin.PluginSet{pluginproto.PluginName: pluginproto.NewPlugin(pluginproto.ClientOptions{})},
		Cmd:              program(context.Background()),
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		AutoMTLS:         true,
		SkipHostEnv:      true,
		Logger:           logger,
	})
	t.Cleanup(p.Kill)
	rpc, err := p.Client()
	if err != nil {
		t.Fatal(err)
	}
	d, err := rpc.Dispense(pluginproto.PluginName)
	if err != nil {
		t.Fatal(err)
	}
	return d.(pluginproto.Driver)
}

func TestCommandLine(t *testing.T) {
	runDriver := func(args ...string) (out, errs string, code int) {
		cmd := program(t.Context(), args...)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
			t.Fatal(err)
		}
		return stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()
	}
	out, _, code := runDriver("--version")
	if code != 0 || out != "kmsd-driver-luna dev\n" {
		t.Errorf("--version: code %d, %q", code, out)
	}
	for _, args := range [][]string{nil, {"--help"}, {"init-token"}} {
		out, errs, code := runDriver(args...)
		if code != 2 || out != "" || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "lunacm") {
			t.Errorf("%v: code %d, %q, %q", args, code, out, errs)
		}
	}
}
