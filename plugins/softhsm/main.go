// Command kmsd-driver-softhsm answers: what is peculiar about SoftHSM 2?
//
// kmsd starts it, one process for each token. The one thing a person or a script
// may ask of it is a new token:
//
//	kmsd-driver-softhsm init-token < request.json
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
	if code, done := p11.Command(quirks(), version, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); done {
		return code
	}
	handshake := pluginproto.Handshake()
	if os.Getenv(handshake.MagicCookieKey) != handshake.MagicCookieValue {
		fmt.Fprintln(os.Stderr, "kmsd-driver-softhsm is started by kmsd, which reads the PIN and talks to it; "+
			"to make a token, give a JSON request to: kmsd-driver-softhsm init-token")
		return 2
	}
	logger := pluginproto.NewLogger(quirks().Driver)
	return pluginproto.Serve(pluginproto.ServeConfig{
		Driver: p11.New(quirks(), p11.Options{Version: version, Logger: logger}),
		Name:   quirks().Driver,
		Logger: logger,
	})
}
