// Command mariadb-demo answers: does an unmodified MariaDB notice when HSMs fail?
//
// It starts kmsd on three SoftHSM tokens and a MariaDB of its own with the lines of
// kmsd.cnf, fills an encrypted table, rotates its key, kills a driver, takes all HSMs away,
// and restarts MariaDB. It exits with 0 only if every row is there at the end and none was
// readable on disk.
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

// timeLimit is far more than the demo takes: about a quarter of a minute.
const timeLimit = 3 * time.Minute

func main() {
	bin := flag.String("bin", "bin", "folder with kmsd and its drivers")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "mariadb-demo takes no arguments, only flags: %v\n", flag.Args())
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := demonstrate(ctx, *bin); err != nil {
		fmt.Fprintf(os.Stderr, "\nThe demo failed: %v\n", err)
		os.Exit(1)
	}
}

func demonstrate(ctx context.Context, bin string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, timeLimit)
	defer cancel()
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "mariadb-demo-")
	if err != nil {
		return err
	}
	d := &demo{bin: bin, dir: dir, begin: time.Now()}
	err = d.run(ctx)
	d.close()
	if err != nil {
		return fmt.Errorf("%w\nWhat there is to look at is in %s", err, dir)
	}
	return os.RemoveAll(dir)
}
