// Package supervisor answers: is this driver process alive, and does it speak the
// contract?
//
// [Start] checks a driver program, starts it and shakes hands with it. The
// [Process] it returns is a driver like any other, with a process to watch and to
// kill. A process is never started again: whoever lost one starts another.
package supervisor

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"

	"kmsd/pluginproto"
)

const (
	// startTimeout is how long a driver may take from its start to the handshake. It does
	// not wait for an HSM yet, but a machine that starts with a hundred of them does: to
	// kill those that are late, and begin anew, would keep it from ever being done. It is
	// shorter than what a group has for a connection, whose failure says less.
	startTimeout = 25 * time.Second
	// A child of the driver's may keep the pipes of one that has ended from ending, so
	// they are looked at now and then, and closed when nothing is in them, or at last.
	drainPause = 500 * time.Millisecond
	drainLooks = 60
)

// Spec says what to start.
type Spec struct {
	Name string // of the member, for errors and the log
	Path string // of the driver program

	// SHA256 is what the program has to hash to, 32 bytes. It may be missing only
	// with Insecure.
	SHA256   []byte
	Insecure bool

	Logger         hclog.Logger  // gets what the driver says; nil means nobody does
	CommandTimeout time.Duration // see pluginproto.ClientOptions; zero means 20 s
}

// Process is a driver in a process of its own.
type Process struct {
	*pluginproto.Client
	os   *osProcess
	gone chan struct{}
}

// Done is closed when the process has ended and nothing is left of it.
func (p *Process) Done() <-chan struct{} { return p.gone }

// Kill ends the process at once. What it was doing in the HSM may go on there.
func (p *Process) Kill() { p.os.kill() }

// PID is the number of the process.
func (p *Process) PID() int { return p.os.pid }

// Close is the graceful end: it lets the driver log out, and then ends the process.
func (p *Process) Close() error {
	err := p.Client.Close()
	p.Kill()
	<-p.gone
	return err
}

// Start starts a driver and returns when it has shaken hands; its token is still to
// be opened. ctx ends only the start. Every error but ctx's own is a
// [pluginproto.Error] of ClassMember; it is permanent when the program is not there,
// may not be run, or is not the one that was asked for. When Start fails, nothing of
// the process is left.
func Start(ctx context.Context, spec Spec) (_ *Process, err error) {
	if err := ctx.Err(); err != nil {
		return nil, spec.failure(err)
	}
	if err := spec.check(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("no handshake within %v", startTimeout))
	defer cancel()
	dir, err := socketDir()
	if err != nil {
		return nil, spec.failure(fmt.Errorf("making a directory for its socket: %w", err))
	}
	p := &Process{gone: make(chan struct{})}
	client := plugin.NewClient(p.config(ctx, spec, dir))
	driver, err := shakeHands(client)
	// The one connection stands or has failed, so the way to the socket is not
	// needed any more; without it nobody else finds it, and a daemon that is killed
	// leaves nothing behind.
	os.RemoveAll(dir)
	if p.os == nil { // it was never started
		return nil, spec.failure(err)
	}
	if err == nil {
		// From here on the process is its owner's; until here it was ctx's.
		if !p.os.release() {
			err = context.Cause(ctx)
		}
	}
	go p.bury(client)
	if err != nil {
		p.Kill()
		<-p.gone
		return nil, spec.failure(p.os.explain(ctx, err))
	}
	p.Client = driver
	return p, nil
}

// socketDir makes a directory for the socket of one driver, to be removed when the
// connection stands. go-plugin's own would stay behind a driver that is killed.
func socketDir() (string, error) {
	// A socket's path has room for 107 bytes (unix(7)); go-plugin adds about
	// "/plugin-dir1234567890/plugin1234567890".
	const room = 107 - 40
	dir, err := os.MkdirTemp("", "kmsd-driver-")
	if err == nil && len(dir) > room {
		os.Remove(dir)
		err = fmt.Errorf("%s is too long for the path of a socket; set TMPDIR to a shorter one", filepath.Dir(dir))
	}
	return dir, err
}

// config is go-plugin's, but for the process itself, which is ours: see osProcess.
// SecureConfig is not used, because it does not say which sum was found.
func (p *Process) config(ctx context.Context, spec Spec, dir string) *plugin.ClientConfig {
	logger := spec.Logger
	if logger == nil {
		logger = hclog.NewNullLogger()
	}
	return &plugin.ClientConfig{
		HandshakeConfig: pluginproto.Handshake(),
		Plugins: plugin.PluginSet{
			pluginproto.PluginName: pluginproto.NewPlugin(pluginproto.ClientOptions{CommandTimeout: spec.CommandTimeout}),
		},
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		AutoMTLS:         true,
		SkipHostEnv:      true, // the daemon's environment may hold secrets
		StartTimeout:     startTimeout,
		Logger:           logger.With("member", spec.Name),
		UnixSocketConfig: &plugin.UnixSocketConfig{TempDir: dir},
		RunnerFunc: func(_ hclog.Logger, cmd *exec.Cmd, _ string) (runner.Runner, error) {
			o, err := newOSProcess(ctx, spec.Path, slices.Concat(cmd.Env, []string{
				fmt.Sprintf("%s=%d", pluginproto.ParentPIDEnv, os.Getpid()),
			}))
			if err != nil {
				return nil, err
			}
			p.os = o
			return o, nil
		},
	}
}

// shakeHands starts the process, connects to it and has it answer once.
func shakeHands(client *plugin.Client) (*pluginproto.Client, error) {
	protocol, err := client.Client()
	if err != nil {
		return nil, err
	}
	if err := protocol.Ping(); err != nil {
		return nil, fmt.Errorf("reaching it after the handshake: %w", err)
	}
	raw, err := protocol.Dispense(pluginproto.PluginName)
	if err != nil {
		return nil, err
	}
	driver, ok := raw.(*pluginproto.Client)
	if !ok {
		return nil, fmt.Errorf("it offers a %T", raw)
	}
	return driver, nil
}

// bury waits for the end of the process and removes what is left of it.
func (p *Process) bury(client *plugin.Client) {
	defer close(p.gone)
	<-p.os.ended
	read := make(chan struct{})
	var drained sync.WaitGroup
	drained.Go(func() { p.os.drain(read) })
	client.Kill() // waits for go-plugin's readers of the pipes, and ends the connection
	close(read)
	drained.Wait()
	p.os.closePipes()
}

func (s Spec) failure(err error) error { return failureOf(s.Name, filepath.Base(s.Path), err) }
