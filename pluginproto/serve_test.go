package pluginproto_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"

	"kmsd/internal/memdriver"
	"kmsd/pluginproto"
)

// patience is for what a process has to do at some time, on a machine of any speed.
const patience = time.Minute

// roleEnv makes this test binary a driver, or a daemon that has started one.
const roleEnv = "PLUGINPROTO_TEST_ROLE"

func serveWhenAsked() bool {
	switch os.Getenv(roleEnv) {
	case "driver":
		os.Exit(pluginproto.Serve(pluginproto.ServeConfig{
			Driver: hardened{memdriver.New(memdriver.Options{})},
			Name:   "memory",
		}))
	case "daemon":
		_, client := startDriver(os.Getpid(), os.NewFile(3, "alive"))
		if _, err := client.Client(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println("ready")
		select {} // until it is killed
	}
	return false
}

// hardened tells in TokenInfo.Model whether the process could be dumped when the
// PIN arrived.
type hardened struct{ pluginproto.Driver }

func (h hardened) Open(ctx context.Context, req pluginproto.OpenRequest) (pluginproto.TokenInfo, error) {
	info, err := h.Driver.Open(ctx, req)
	dumpable, prctlErr := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	var core unix.Rlimit
	limitErr := unix.Getrlimit(unix.RLIMIT_CORE, &core)
	info.Model = fmt.Sprintf("dumpable %d, core %d, %v", dumpable, core.Cur, errors.Join(prctlErr, limitErr))
	return info, err
}

// startDriver runs this binary as a driver of the process with the given id. It
// keeps alive open for as long as it lives.
func startDriver(parent int, alive *os.File) (*exec.Cmd, *plugin.Client) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = []string{roleEnv + "=driver", pluginproto.ParentPIDEnv + "=" + strconv.Itoa(parent)}
	if alive != nil {
		cmd.ExtraFiles = []*os.File{alive}
	}
	return cmd, plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  pluginproto.Handshake(),
		Plugins:          plugin.PluginSet{pluginproto.PluginName: pluginproto.NewPlugin(pluginproto.ClientOptions{})},
		Cmd:              cmd,
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		AutoMTLS:         true,
		SkipHostEnv:      true,
		Logger:           hclog.NewNullLogger(),
	})
}

// dispense starts a driver process and gives its Driver.
func dispense(t *testing.T) (*exec.Cmd, *pluginproto.Client) {
	t.Helper()
	cmd, client := startDriver(os.Getpid(), nil)
	t.Cleanup(client.Kill)
	protocol, err := client.Client()
	if err != nil {
		t.Fatalf("starting the driver: %v", err)
	}
	dispensed, err := protocol.Dispense(pluginproto.PluginName)
	if err != nil {
		t.Fatalf("dispensing the driver: %v", err)
	}
	return cmd, dispensed.(*pluginproto.Client)
}

func TestDriverProcess(t *testing.T) {
	t.Run("it serves, hardened, until it is closed", func(t *testing.T) {
		_, driver := dispense(t)
		info, err := driver.Open(t.Context(), openRequest())
		if err != nil {
			t.Fatal(err)
		}
		if want := "dumpable 0, core 0, <nil>"; info.Model != want {
			t.Errorf("the process is %q, want %q", info.Model, want)
		}
		big := pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: pluginproto.KeyID{1}, Input: make([]byte, pluginproto.MaxInput), IV: make([]byte, 12)}
		if _, err := driver.Generate(t.Context(), pluginproto.KeySpec{ID: big.Key, Type: pluginproto.AES256}); err != nil {
			t.Fatal(err)
		}
		for _, cmd := range []pluginproto.Command{probe, random, big} {
			if err := do(t.Context(), driver, cmd); err != nil {
				t.Error(err)
			}
		}
		if err := driver.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	t.Run("its death fails every call at once", func(t *testing.T) {
		cmd, driver := dispense(t)
		_, err := driver.Open(t.Context(), openRequest())
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for err = nil; err == nil; err = do(t.Context(), driver, probe) {
		}
		wantMember(t, err, "the driver process is gone") // and not that it has not answered
	})
}

func TestDriverEndsWithItsParent(t *testing.T) {
	t.Run("when the daemon is killed", func(t *testing.T) {
		read, alive, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer read.Close()
		daemon := exec.Command(os.Args[0])
		daemon.Env = []string{roleEnv + "=daemon"}
		daemon.ExtraFiles = []*os.File{alive}
		daemon.Stderr = os.Stderr
		out, err := daemon.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := daemon.Start(); err != nil {
			t.Fatal(err)
		}
		alive.Close()
		ready := make([]byte, len("ready"))
		if _, err := io.ReadFull(out, ready); err != nil {
			t.Fatalf("waiting for the daemon: %v", err)
		}
		if err := daemon.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = daemon.Wait() // it says that it was killed
		if err := read.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		// Nobody writes; the end comes when the last process that has the pipe does.
		if _, err := read.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the driver outlives its daemon: %v", err)
		}
	})
	t.Run("when the daemon was gone before it looked", func(t *testing.T) {
		wantExit(t, roleEnv+"=driver", pluginproto.ParentPIDEnv+"=1", cookie())
	})
	t.Run("when it cannot know its daemon", func(t *testing.T) {
		wantExit(t, roleEnv+"=driver", pluginproto.ParentPIDEnv+"=nobody", cookie())
	})
	t.Run("when a person has started it", func(t *testing.T) {
		if out := wantExit(t, roleEnv+"=driver"); !strings.Contains(out, "plugin") {
			t.Errorf("it said %q", out)
		}
	})
}

func cookie() string {
	h := pluginproto.Handshake()
	return h.MagicCookieKey + "=" + h.MagicCookieValue
}

// wantExit runs this binary and says that it ends by itself, with code 1.
func wantExit(t *testing.T, env ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = env
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGKILL) }
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("it ended with %v, want exit code 1: %s", err, out.String())
	}
	return out.String()
}
