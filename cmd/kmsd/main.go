// Command kmsd keeps master keys in a group of HSMs and wraps and unwraps with
// them, and is the command line to a kmsd that runs elsewhere. See kmsd help.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"kmsd/cmd/kmsd/internal/app"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := app.Main(ctx, os.Args[1:], app.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr})
	stop()
	os.Exit(code)
}
