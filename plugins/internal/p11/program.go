package p11

import (
	"fmt"
	"os"

	"kmsd/pluginproto"
)

// Program is a driver as a command.
type Program struct {
	Quirks  Quirks
	Version string
	// InitToken is whether it can be asked for a new token.
	InitToken bool
	// Advice is what a person is told who starts it by hand, after who is meant to.
	Advice string
}

// Run is the main function of a driver. It serves the one who has started it, and returns
// its exit code.
func (p Program) Run() int {
	name := "kmsd-driver-" + p.Quirks.Driver
	switch args := os.Args[1:]; {
	case len(args) == 1 && args[0] == "--version":
		fmt.Printf("%s %s\n", name, p.Version)
		return 0
	case len(args) == 1 && args[0] == "init-token" && p.InitToken:
		if err := p.Quirks.InitToken(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintf(os.Stderr, "init-token: %v\n", err)
			return 1
		}
		return 0
	}
	handshake := pluginproto.Handshake()
	if os.Getenv(handshake.MagicCookieKey) != handshake.MagicCookieValue {
		fmt.Fprintf(os.Stderr, "%s is started by kmsd, which reads the PIN and talks to it; %s\n", name, p.Advice)
		return 2
	}
	logger := pluginproto.NewLogger(p.Quirks.Driver)
	return pluginproto.Serve(pluginproto.ServeConfig{
		Driver: New(p.Quirks, Options{Version: p.Version, Logger: logger}),
		Name:   p.Quirks.Driver,
		Logger: logger,
	})
}
