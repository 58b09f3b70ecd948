package supervisor_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-plugin"

	"kmsd/internal/leaktest"
	"kmsd/internal/memdriver"
	"kmsd/kms/internal/supervisor"
	"kmsd/pluginproto"
)

// The test binary is every program that the tests start: which one it is, its name
// says, because a driver gets neither arguments nor an environment of ours.
var programs = map[string]func() int{
	"driver": func() int {
		return pluginproto.Serve(pluginproto.ServeConfig{Driver: memdriver.New(memdriver.Options{}), Name: "mem"})
	},
	"crash": func() int {
		fmt.Fprintln(os.Stderr, "cannot find\x1b[2J my library")
		return 7
	},
	"farewell": func() int {
		for range 90 { // more than go-plugin reads at once, and less than what fits into a pipe besides
			fmt.Fprintln(os.Stderr, strings.Repeat("x", 1000))
		}
		fmt.Fprintln(os.Stderr, "my last words")
		return 7
	},
	"garbage": func() int {
		fmt.Println("Hello, I am\x1b[31m no driver.")
		return hang()
	},
	"slow":        hang,
	"old-version": serveOldVersion,
	"environment": func() int {
		for _, e := range os.Environ() {
			fmt.Fprintln(os.Stderr, "env:", e)
		}
		n, err := os.Stdin.Read(make([]byte, 1))
		fmt.Fprintln(os.Stderr, "stdin:", n, err, "args:", len(os.Args))
		return 1
	},
	"parent": parent,
}

func TestMain(m *testing.M) {
	if program, ok := programs[filepath.Base(os.Args[0])]; ok {
		os.Exit(program())
	}
	leaktest.Main(m)
}

// hang does nothing until it is killed, or the test that owns its input is.
func hang() int {
	select {}
}

// serveOldVersion speaks a protocol version that is not ours.
func serveOldVersion() int {
	handshake := pluginproto.Handshake()
	handshake.ProtocolVersion = 99
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: handshake,
		Plugins:         plugin.PluginSet{},
		GRPCServer:      plugin.DefaultGRPCServer,
	})
	return 0
}

// parent is a daemon with one driver, whose process it tells on its output. It
// lives until it is killed.
func parent() int {
	path, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil {
		return 1
	}
	p, err := supervisor.Start(context.Background(), supervisor.Spec{Name: "a", Path: path[:len(path)-1], Insecure: true})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(p.PID())
	return hang()
}
