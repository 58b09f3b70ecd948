package drivertest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"

	"kmsd/pluginproto"
)

// The test binary is the driver when it is started with this variable.
const asDriver = "KMSD_TEST_AS_DRIVER"

// Main is the TestMain of a driver: it runs the tests, or the driver's own main function
// where [Program] has started the test binary.
func Main(m *testing.M, driver func() int) {
	if os.Getenv(asDriver) != "" {
		os.Exit(driver())
	}
	os.Exit(m.Run())
}

// Program is this test binary as the driver, with a clean environment.
func Program(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	// The race detector lets a process linger for a second when it ends.
	cmd.Env = []string{asDriver + "=1", "GORACE=atexit_sleep_ms=0"}
	return cmd
}

// Process starts a driver process that ends with the test. All that it logs goes to logged;
// nil: nobody wants it.
func Process(t testing.TB, logged io.Writer) pluginproto.Driver {
	t.Helper()
	logger := hclog.NewNullLogger()
	if logged != nil {
		logger = hclog.New(&hclog.LoggerOptions{Output: logged, Level: hclog.Trace})
	}
	p := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  pluginproto.Handshake(),
		Plugins:          plugin.PluginSet{pluginproto.PluginName: pluginproto.NewPlugin(pluginproto.ClientOptions{})},
		Cmd:              Program(context.Background()),
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

// Command runs the driver as a person would, with in as its input.
func Command(t testing.TB, in []byte, args ...string) (out, errs string, code int) {
	t.Helper()
	cmd := Program(t.Context(), args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &stdout, &stderr
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	return stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()
}
