package pluginproto

import (
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
)

// ServeConfig is what the main function of a driver gives to [Serve].
type ServeConfig struct {
	// Driver is served. It holds no secret yet: those arrive with Open.
	Driver Driver
	// Name is the driver's name, for the log.
	Name string
	// Logger writes where the daemon reads. Nil means NewLogger(Name).
	Logger hclog.Logger
	// Workers is how many commands run at once; zero means 64. See [ServerOptions].
	Workers int
}

// NewLogger makes the logger of a driver process: JSON lines on stderr, which join
// the daemon's log.
func NewLogger(name string) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{
		Name:       name,
		Output:     os.Stderr,
		JSONFormat: true,
		Level:      hclog.Debug, // the daemon decides what it keeps
	})
}

// parentInterval is how often a driver looks whether its parent still lives.
const parentInterval = 250 * time.Millisecond

// Serve is the whole of a driver's main function: it hardens the process, watches
// its parent, speaks the handshake and serves until the daemon ends it. It returns
// the exit code.
//
// The process ends when its parent does, however that happens. It is started by
// kmsd only; a person who starts it is told so.
func Serve(cfg ServeConfig) int {
	logger := cfg.Logger
	if logger == nil {
		logger = NewLogger(cfg.Name)
	}
	if err := Harden(); err != nil {
		logger.Error("hardening the process", "error", err)
		return 1
	}
	parent, err := parentPID()
	if err != nil {
		logger.Error("finding the parent process", "error", err)
		return 1
	}
	go watchParent(parent)
	driver := &closedOnce{Driver: cfg.Driver}
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: Handshake(),
		Logger:          logger,
		Plugins: plugin.PluginSet{PluginName: &grpcPlugin{register: func(s *grpc.Server) {
			RegisterServer(s, driver, ServerOptions{Workers: cfg.Workers})
		}}},
		GRPCServer: NewServer,
	})
	if err := driver.Close(); err != nil {
		logger.Warn("closing the driver", "error", err)
	}
	return 0
}

// closedOnce lets both the daemon and the end of the process close a driver.
type closedOnce struct {
	Driver
	once sync.Once
	err  error
}

func (c *closedOnce) Close() error {
	c.once.Do(func() { c.err = c.Driver.Close() })
	return c.err
}

// NewServer makes a gRPC server with the message limits of the contract.
func NewServer(opts []grpc.ServerOption) *grpc.Server {
	return grpc.NewServer(append(opts[:len(opts):len(opts)],
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
	)...)
}

// parentPID returns the process that this one must not outlive. The supervisor names
// itself, because the parent may have died before we looked.
func parentPID() (int, error) {
	s, ok := os.LookupEnv(ParentPIDEnv)
	if !ok {
		return os.Getppid(), nil
	}
	pid, err := strconv.Atoi(s)
	if err != nil {
		return 0, fmt.Errorf("reading %s: %w", ParentPIDEnv, err)
	}
	return pid, nil
}

// watchParent ends this process at once when its parent is another one than it
// should be. It asks nobody and does not log: neither a C call that hangs nor a full
// pipe may keep a logged-in process alive. It lives as long as the process.
func watchParent(pid int) {
	for os.Getppid() == pid {
		time.Sleep(parentInterval)
	}
	os.Exit(1)
}
