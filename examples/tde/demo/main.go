// Command tde-demo answers: do the databases notice when HSMs fail?
//
// It starts kmsd on three SoftHSM tokens, runs encrypted databases (package tde) on
// it under load, kills one driver, freezes another, makes keys meanwhile, re-keys,
// restarts kmsd and then checks every row and every copy of every key. It exits
// with 0 only if all of that holds.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// timeLimit is far more than the demo takes: about half a minute.
const timeLimit = 3 * time.Minute

func main() {
	bin := flag.String("bin", "bin", "folder with kmsd and its drivers")
	keep := flag.String("dir", "", "keep everything in this new folder (default: a temporary one, removed when all went well)")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "tde-demo takes no arguments, only flags: %v\n", flag.Args())
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := demonstrate(ctx, *bin, *keep); err != nil {
		fmt.Fprintf(os.Stderr, "\nThe demo failed: %v\n", err)
		os.Exit(1)
	}
}

func demonstrate(ctx context.Context, bin, keep string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, timeLimit)
	defer cancel()
	dir := keep
	if dir == "" {
		if dir, err = os.MkdirTemp("", "kmsd-demo-"); err != nil {
			return err
		}
		defer func() {
			if err == nil {
				err = os.RemoveAll(dir)
			} else {
				err = fmt.Errorf("%w\nWhat there is to look at is in %s", err, dir)
			}
		}()
	} else if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	d := &demo{bin: bin, dir: dir, account: newAccount(os.Stdout), load: newLoad()}
	defer d.close()
	return d.run(ctx)
}
