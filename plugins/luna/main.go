// Command kmsd-driver-luna answers: what is peculiar about a Thales Luna?
//
// kmsd starts it, one process for each partition. It has no command to make a partition:
// that is done with Thales' lunacm.
package main

import (
	"fmt"
	"os"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// version is set when a release is built.
var version = "dev"

func main() { os.Exit(run()) }

func run() int {
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		fmt.Printf("kmsd-driver-luna %s\n", version)
		return 0
	}
	handshake := pluginproto.Handshake()
	if os.Getenv(handshake.MagicCookieKey) != handshake.MagicCookieValue {
		fmt.Fprintln(os.Stderr, "kmsd-driver-luna is started by kmsd, which reads the PIN and talks to it; "+
			"partitions are made with lunacm (partition init, role init), not here")
		return 2
	}
	logger := pluginproto.NewLogger(quirks().Driver)
	return pluginproto.Serve(pluginproto.ServeConfig{
		Driver: p11.New(quirks(), p11.Options{Version: version, Logger: logger}),
		Name:   quirks().Driver,
		Logger: logger,
	})
}
