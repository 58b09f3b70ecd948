// Package mariadbtest answers: how does a test or a demo run a MariaDB of its own?
//
// It runs mariadbd as a process of the user who calls, with a data directory, a
// configuration and a socket that nobody else uses and no port at all, and ends it, politely
// or not. The data directory outlives the process, so that a second [Server.Start] goes on
// with the same tables. The system's own MariaDB, if there is one, is not touched.
package mariadbtest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/go-sql-driver/mysql"

	"kmsd/internal/devserver"
)

const install = "install MariaDB (Debian: apt-get install mariadb-server)"

// private makes a server small, and reachable through its socket only.
const private = `[mariadbd]
skip-networking
skip-name-resolve
innodb_log_file_size=8M
innodb_buffer_pool_size=32M
aria_log_file_size=8M
`

// Server is a MariaDB. Its methods are for one caller at a time; DB is for any number.
type Server struct {
	Dir  string // everything but the socket
	Data string // the data directory, in Dir

	sockets string // a folder with a short path: that of a socket is limited to 107 bytes
	conf    string // path of its configuration
	log     string // path of its error log

	// Of the running process; nil while there is none.
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
	err  error         // how it ended; read after done
	db   *sql.DB
}

// Install makes an empty data directory, which New copies: that is much faster than to
// install again.
func Install(ctx context.Context, data string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("installing a data directory of MariaDB in %s: %w", data, err)
		}
	}()
	path, err := find("mariadb-install-db")
	if err != nil {
		return err
	}
	conf := data + ".cnf"
	if err := os.WriteFile(conf, []byte(private), 0o600); err != nil {
		return err
	}
	args := append([]string{"--defaults-file=" + conf, "--datadir=" + data, "--auth-root-authentication-method=normal",
		"--skip-test-db", "--skip-name-resolve"}, user()...)
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = "/" // it looks for an installation where it is
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w; it said:\n%s", err, out)
	}
	return nil
}

// New makes a server in dir, which must not exist yet, with a copy of a data directory that
// Install made. The options are lines of its configuration. It does not run yet; Close
// removes what is not in dir.
func New(dir, installed string, options ...string) (_ *Server, err error) {
	s := &Server{Dir: dir, Data: filepath.Join(dir, "data"), conf: filepath.Join(dir, "my.cnf"), log: filepath.Join(dir, "error.log")}
	if s.sockets, err = os.MkdirTemp("", "mariadb-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(s.sockets)
			err = fmt.Errorf("making a MariaDB in %s: %w", dir, err)
		}
	}()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.CopyFS(s.Data, os.DirFS(installed)); err != nil {
		return nil, err
	}
	tmp := filepath.Join(dir, "tmp")
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return nil, err
	}
	own := fmt.Sprintf("datadir=%s\ntmpdir=%s\nsocket=%s\npid_file=%s\nlog_error=%s\n",
		s.Data, tmp, s.Socket(), filepath.Join(dir, "pid"), s.log)
	// A token of kmsd may be among the options.
	return s, os.WriteFile(s.conf, []byte(private+own+strings.Join(options, "\n")+"\n"), 0o600)
}

// Close kills the server if it runs. Its data stays.
func (s *Server) Close() error {
	s.Kill()
	return os.RemoveAll(s.sockets)
}

// Socket is where clients of this machine reach it, as root without a password.
func (s *Server) Socket() string { return filepath.Join(s.sockets, "sock") }

// Start runs mariadbd and returns when it answers. When ctx ends before that, the process is
// killed; after Start has returned, only Stop, Kill and Close end it. An error ends with what
// the server wrote to its error log.
func (s *Server) Start(ctx context.Context) (err error) {
	if s.cmd != nil {
		return fmt.Errorf("the MariaDB in %s runs already", s.Dir)
	}
	before := s.Log()
	defer func() {
		if err != nil {
			err = fmt.Errorf("starting the MariaDB in %s: %w; its error log says:\n%s", s.Dir, err, strings.TrimPrefix(s.Log(), before))
		}
	}()
	path, err := find("mariadbd")
	if err != nil {
		return err
	}
	cmd := exec.Command(path, append([]string{"--defaults-file=" + s.conf}, user()...)...)
	// A process group of its own: Ctrl-C goes to whoever started this, who then decides.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	s.cmd, s.done = cmd, make(chan struct{})
	go func() {
		s.err = cmd.Wait()
		close(s.done)
	}()
	if err := s.connect(ctx); err != nil {
		s.Kill()
		return err
	}
	return nil
}

// connect waits until the process answers, or has ended.
func (s *Server) connect(ctx context.Context) error {
	cfg := mysql.NewConfig()
	cfg.User, cfg.Net, cfg.Addr = "root", "unix", s.Socket()
	cfg.Logger = quiet{}
	connector, err := mysql.NewConnector(cfg)
	if err != nil {
		return err
	}
	s.db = sql.OpenDB(connector)
	return devserver.Poll(ctx, func() error {
		select {
		case <-s.done:
			return devserver.Final(fmt.Errorf("the process ended: %w", s.err))
		default:
			return s.db.PingContext(ctx)
		}
	})
}

// quiet drops what the driver says about connections that end, beside the errors that it
// returns.
type quiet struct{}

func (quiet) Print(...any) {}

// DB is a pool of connections to the running server, as root. It is another one after each
// start.
func (s *Server) DB() *sql.DB { return s.db }

// PID is the process ID of the running server.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Stop asks the server to end with SIGTERM and waits. When ctx ends first, the process is
// killed and that is an error, as is an exit code other than 0.
func (s *Server) Stop(ctx context.Context) error {
	if s.cmd == nil {
		return nil
	}
	defer s.forget()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stopping the MariaDB in %s: %w", s.Dir, err)
	}
	select {
	case <-s.done:
	case <-ctx.Done():
		return fmt.Errorf("stopping the MariaDB in %s: it did not end by itself: %w", s.Dir, ctx.Err())
	}
	if s.err != nil {
		return fmt.Errorf("stopping the MariaDB in %s: %w", s.Dir, s.err)
	}
	return nil
}

// Kill ends the server with SIGKILL, if it runs, and waits for that.
func (s *Server) Kill() {
	if s.cmd != nil {
		s.forget()
	}
}

// forget makes sure that the process has ended, and lets go of it.
func (s *Server) forget() {
	s.cmd.Process.Kill()
	<-s.done
	if s.db != nil {
		s.db.Close()
	}
	s.cmd, s.done, s.err, s.db = nil, nil, nil, nil
}

// Log is all that the server has written to its error log.
func (s *Server) Log() string {
	b, err := os.ReadFile(s.log)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err.Error()
	}
	return string(b)
}

// user makes the server run as root when root calls, which it otherwise refuses.
func user() []string {
	if os.Geteuid() == 0 {
		return []string{"--user=root"}
	}
	return nil
}

// find looks for a program of MariaDB also where Debian puts daemons, which is not in the
// path of a normal user.
func find(name string) (string, error) {
	for _, candidate := range []string{name, "/usr/sbin/" + name, "/usr/libexec/" + name} {
		if path, err := exec.LookPath(candidate); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no %s: %s", name, install)
}
