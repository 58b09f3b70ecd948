package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-plugin/runner"
	"golang.org/x/sys/unix"
)

// osProcess is the process of one driver, as go-plugin's runner.Runner.
//
// One goroutine starts it and waits for it, tied to one thread: the kernel kills
// the driver when the thread that started it ends (see attributes), so that thread
// has to live exactly as long as the driver does.
type osProcess struct {
	cmd            *exec.Cmd
	stdout, stderr *os.File      // our ends
	theirs         [2]*os.File   // the driver's ends; closed after the start
	ended          chan struct{} // closed when the process has ended, or was never started
	pid            int           // set by Start
	killed         atomic.Bool   // by us
	closePipes     func()

	ctx     context.Context // of the start
	release func() bool     // keeps the end of ctx from killing the process; false: too late
}

var _ runner.Runner = (*osProcess)(nil)

// newOSProcess prepares a process without arguments and with no more environment
// than env. Its input is empty.
func newOSProcess(ctx context.Context, path string, env []string) (_ *osProcess, err error) {
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		outR.Close()
		outW.Close()
		return nil, err
	}
	return &osProcess{
		cmd: &exec.Cmd{
			Path: path, Args: []string{path}, Env: env, Dir: "/",
			Stdout: outW, Stderr: errW, SysProcAttr: attributes(),
		},
		stdout: outR, stderr: errR, theirs: [2]*os.File{outW, errW},
		closePipes: sync.OnceFunc(func() { outR.Close(); errR.Close() }),
		ended:      make(chan struct{}),
		ctx:        ctx,
		release:    func() bool { return true },
	}, nil
}

// Start implements runner.Runner. go-plugin's context is not the caller's, and is
// not used.
func (o *osProcess) Start(context.Context) error {
	started := make(chan error)
	go o.live(started)
	if err := <-started; err != nil {
		o.closePipes()
		return err
	}
	o.release = context.AfterFunc(o.ctx, o.kill)
	return nil
}

// live is the goroutine of the process's thread.
func (o *osProcess) live(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(o.ended)
	err := o.cmd.Start()
	for _, f := range o.theirs {
		f.Close()
	}
	if err != nil {
		started <- err
		return
	}
	o.pid = o.cmd.Process.Pid
	started <- nil
	_ = o.cmd.Wait() // ProcessState has it
}

// drain closes the pipes of a process that has ended once what it has said is read. What a
// driver says before it ends tells why, and its reader may be late on a busy machine.
func (o *osProcess) drain(read <-chan struct{}) {
	look := time.NewTicker(drainPause)
	defer look.Stop()
	for range drainLooks {
		select {
		case <-read:
			return
		case <-look.C:
		}
		if !unread(o.stdout) && !unread(o.stderr) {
			break
		}
	}
	o.closePipes()
}

// unread reports whether something is in a pipe. There is nothing in one that is closed.
func unread(f *os.File) bool {
	pipe, err := f.SyscallConn()
	if err != nil {
		return false
	}
	var some bool
	err = pipe.Control(func(fd uintptr) {
		look := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(look, 0)
		some = err == nil && n == 1 && look[0].Revents&unix.POLLIN != 0
	})
	return err == nil && some
}

func (o *osProcess) kill() {
	if o.pid != 0 {
		o.killed.Store(true)
		_ = o.cmd.Process.Kill() // it fails only when the process has ended
	}
}

// explain adds to the failure of a start how the process ended, if it did so by
// itself, and prefers the reason why the caller's time was over.
func (o *osProcess) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if s := o.cmd.ProcessState; s != nil && s.String() != killed { // which is what we do
		return fmt.Errorf("%w: it ended with %s; see what it logged", err, s)
	}
	return err
}

// Wait implements runner.Runner. go-plugin logs what it returns as an error, which
// our own kill is not: whoever kills a driver says why.
func (o *osProcess) Wait(context.Context) error {
	<-o.ended
	if s := o.cmd.ProcessState; s != nil && !s.Success() && !(o.killed.Load() && s.String() == killed) {
		return errors.New(s.String())
	}
	return nil
}

// killed is how a process's state says that it was ended by SIGKILL.
const killed = "signal: killed"

// Kill implements runner.Runner.
func (o *osProcess) Kill(context.Context) error {
	o.kill()
	return nil
}

// Stdout implements runner.Runner.
func (o *osProcess) Stdout() io.ReadCloser { return o.stdout }

// Stderr implements runner.Runner. go-plugin logs the lines as they are.
func (o *osProcess) Stderr() io.ReadCloser { return shown{o.stderr} }

// shown is text that cannot do anything to the terminal that a log may be on: a library
// writes to its driver's stderr what it likes.
type shown struct{ io.ReadCloser }

func (s shown) Read(b []byte) (int, error) {
	n, err := s.ReadCloser.Read(b)
	for i, c := range b[:n] {
		if c < ' ' && c != '\n' && c != '\t' && c != '\r' || c == 0x7f {
			b[i] = '?'
		}
	}
	return n, err
}

// Name implements runner.Runner.
func (o *osProcess) Name() string { return o.cmd.Path }

// ID implements runner.Runner.
func (o *osProcess) ID() string { return strconv.Itoa(o.pid) }

// Diagnose implements runner.Runner.
func (o *osProcess) Diagnose(context.Context) string { return "" }

// PluginToHost implements runner.Runner: both live in one file system.
func (o *osProcess) PluginToHost(network, addr string) (string, string, error) {
	return network, addr, nil
}

// HostToPlugin implements runner.Runner.
func (o *osProcess) HostToPlugin(network, addr string) (string, string, error) {
	return network, addr, nil
}
