// Package devserver answers: how does a test or a demo run a kmsd of its own?
//
// It runs "kmsd dev" as a process, waits until it answers, and ends it, politely or
// not. The directory outlives the process, so that a second [Start] goes on with the
// same tokens and keys.
package devserver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Config says what to run.
type Config struct {
	Bin     string   // folder with kmsd and its drivers
	Dir     string   // of tokens, keys, certificates and configuration; made if it does not exist
	Members int      // 0 means 3
	Listen  string   // host:port; "" means a free port on 127.0.0.1
	Log     string   // file that gets all that kmsd prints, appended; "" means DIR.log
	Env     []string // beside PATH and HOME, as "NAME=value"
}

// Env is how to reach a kmsd, as "kmsd dev" writes it to DIR/env.sh.
type Env struct {
	Addr   string // https://host:port
	CACert string // path of a PEM file
	Token  string

	VaultAddr  string // https://host:port for databases; "" when there is none
	VaultToken string
}

// Server is a running kmsd.
type Server struct {
	Env Env
	Dir string
	Log string // path of the file with all that it has printed

	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
	err  error         // how it ended; read after done
}

// pollInterval is the time between two looks at a condition.
const pollInterval = 10 * time.Millisecond

// Start runs "kmsd dev" and returns when it answers. When ctx ends before that, the
// process is killed; after Start has returned, only Stop and Kill end it.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	if cfg.Members == 0 {
		cfg.Members = 3
	}
	if cfg.Listen == "" {
		cfg.Listen = "127.0.0.1:0"
	}
	// An env.sh that an earlier process left must not be taken for this one's.
	path := filepath.Join(cfg.Dir, "env.sh")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("starting kmsd in %s: %w", cfg.Dir, err)
	}
	args := []string{"dev", "--dir", cfg.Dir, "--members", strconv.Itoa(cfg.Members), "--listen", cfg.Listen}
	return start(ctx, cfg, args, func(s *Server) (err error) {
		s.Env, err = ReadEnv(path)
		return err
	})
}

// Serve runs "kmsd serve" on the configuration that an earlier Start has left in
// cfg.Dir, as it is now. Env is that of the earlier server.
func Serve(ctx context.Context, cfg Config, env Env) (*Server, error) {
	c, err := env.Client(1)
	if err != nil {
		return nil, fmt.Errorf("starting kmsd in %s: %w", cfg.Dir, err)
	}
	defer c.Close()
	args := []string{"serve", "-c", filepath.Join(cfg.Dir, "kmsd.yaml")}
	return start(ctx, cfg, args, func(s *Server) error {
		s.Env = env
		_, err := c.Ready(ctx)
		return err
	})
}

// start runs kmsd until answers, which is called again and again, returns nil.
func start(ctx context.Context, cfg Config, args []string, answers func(*Server) error) (_ *Server, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("starting kmsd in %s: %w", cfg.Dir, err)
		}
	}()
	if cfg.Log == "" {
		cfg.Log = filepath.Clean(cfg.Dir) + ".log"
	}
	log, err := os.OpenFile(cfg.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()

	s := &Server{Dir: cfg.Dir, Log: cfg.Log, done: make(chan struct{})}
	s.cmd = exec.Command(filepath.Join(cfg.Bin, "kmsd"), args...)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")}, cfg.Env...)
	// A process group of its own: Ctrl-C goes to whoever started this, who then
	// decides.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		s.err = s.cmd.Wait()
		close(s.done)
	}()
	if err := s.await(ctx, answers); err != nil {
		s.Kill()
		return nil, fmt.Errorf("%w; it said:\n%s", err, tail(cfg.Log, 2000))
	}
	return s, nil
}

// await waits until the process answers, or has ended.
func (s *Server) await(ctx context.Context, answers func(*Server) error) error {
	return Poll(ctx, func() error {
		select {
		case <-s.done:
			return Final(fmt.Errorf("the process ended: %v", s.err))
		default:
			return answers(s)
		}
	})
}

// PID returns the process ID.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Done is closed when the process has ended.
func (s *Server) Done() <-chan struct{} { return s.done }

// Kill ends the process with SIGKILL and waits for that.
func (s *Server) Kill() {
	s.cmd.Process.Kill()
	<-s.done
}

// Stop asks the process to end with SIGTERM and waits. When ctx ends first, the
// process is killed and that is an error, as is an exit code other than 0.
func (s *Server) Stop(ctx context.Context) error {
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stopping kmsd: %w", err)
	}
	select {
	case <-s.done:
	case <-ctx.Done():
		s.Kill()
		return fmt.Errorf("stopping kmsd: it did not end by itself: %w", ctx.Err())
	}
	if s.err != nil {
		return fmt.Errorf("stopping kmsd: %w; it said:\n%s", s.err, tail(s.Log, 2000))
	}
	return nil
}

// ReadEnv reads an env.sh: lines of NAME=value, perhaps behind "export" and in
// quotes.
func ReadEnv(path string) (Env, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Env{}, err
	}
	vars := map[string]string{}
	for line := range strings.Lines(string(b)) {
		name, value, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "export "), "=")
		if ok && !strings.HasPrefix(name, "#") {
			vars[name] = strings.Trim(value, `'"`)
		}
	}
	env := Env{
		Addr: vars["KMSD_ADDR"], CACert: vars["KMSD_CACERT"], Token: vars["KMSD_TOKEN"],
		VaultAddr: vars["KMSD_VAULT_ADDR"], VaultToken: vars["KMSD_VAULT_TOKEN"],
	}
	if env.Addr == "" || env.CACert == "" || env.Token == "" {
		return Env{}, fmt.Errorf("%s lacks KMSD_ADDR, KMSD_CACERT or KMSD_TOKEN", path)
	}
	return env, nil
}

// tail returns the last n bytes of a file, or why it cannot be read.
func tail(path string, n int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-n):])
}
