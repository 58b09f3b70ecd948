package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"kmsd/examples/tde"
	"kmsd/internal/devserver"
	"kmsd/internal/mariadbtest"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

// configuration is what a MariaDB needs to have its keys in kmsd.
//
//go:embed kmsd.cnf
var configuration string

// demo is the story and everything in it.
type demo struct {
	bin, dir string
	begin    time.Time

	kmsd    *devserver.Server
	c       *client.Client
	mariadb *mariadbtest.Server
	rows    int // that have been written
}

const (
	database = "shop" // that "kmsd dev" has for its mount "mariadb"
	pattern  = "4111 1111 1111 1111"
	batch    = 1000 // rows
	// believed is for how long MariaDB takes a version of a key to be the newest.
	believed = 500 * time.Millisecond
)

func (d *demo) run(ctx context.Context) error {
	steps := []func(context.Context) error{
		d.startKmsd, d.startMariaDB, d.fill, d.search, d.rotate, d.killDriver, d.loseAll, d.restart,
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
	}
	fmt.Printf("\nEverything held, in %.0f s.\n", time.Since(d.begin).Seconds())
	return nil
}

// close lets go of what an early end has left.
func (d *demo) close() {
	if d.mariadb != nil {
		d.mariadb.Close()
	}
	if d.c != nil {
		d.c.Close()
	}
	if d.kmsd != nil {
		d.kmsd.Kill()
	}
}

// note prints one line of the story.
func (d *demo) note(format string, args ...any) {
	fmt.Printf("  %5.1f s  %s\n", time.Since(d.begin).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) startKmsd(ctx context.Context) (err error) {
	fmt.Printf("kmsd and MariaDB: an unmodified server whose keys are in three HSMs\n\n")
	d.kmsd, err = devserver.Start(ctx, devserver.Config{Bin: d.bin, Dir: filepath.Join(d.dir, "kmsd")})
	if err != nil {
		return err
	}
	if d.c, err = d.kmsd.Env.Client(0); err != nil {
		return err
	}
	if _, err := devserver.AwaitWhole(ctx, d.c); err != nil {
		return err
	}
	for _, id := range []string{"1", "2"} { // for data and logs, and for temporary files
		if _, err := d.c.PutNamedKey(ctx, database, id, api.NamedKeyPut{}); err != nil {
			return err
		}
	}
	d.note("kmsd runs on three tokens; keys 1 and 2 are made: kmsd database key create shop 1")
	return nil
}

func (d *demo) startMariaDB(ctx context.Context) (err error) {
	installed := filepath.Join(d.dir, "installed")
	if err := mariadbtest.Install(ctx, installed); err != nil {
		return err
	}
	if err := devserver.Poll(ctx, func() error { return d.connects(ctx) }); err != nil {
		return err
	}
	// Of an option that is given twice the last one counts.
	d.mariadb, err = mariadbtest.New(filepath.Join(d.dir, "mariadb"), installed, configuration,
		"hashicorp_key_management_vault_url="+d.kmsd.Env.VaultAddr+"/v1/mariadb",
		"hashicorp_key_management_token="+d.kmsd.Env.VaultToken,
		"hashicorp_key_management_vault_ca="+d.kmsd.Env.CACert,
		fmt.Sprintf("hashicorp_key_management_cache_version_timeout=%d", believed.Milliseconds()),
		"log_bin=binlog")
	if err != nil {
		return err
	}
	if err := d.mariadb.Start(ctx); err != nil {
		return err
	}
	var version string
	if err := d.mariadb.DB().QueryRowContext(ctx, "SELECT VERSION()").Scan(&version); err != nil {
		return err
	}
	d.note("MariaDB %s runs with kmsd.cnf: tables, logs and temporary files encrypted", version)
	return nil
}

func (d *demo) exec(ctx context.Context, stmt string, args ...any) error {
	if _, err := d.mariadb.DB().ExecContext(ctx, stmt, args...); err != nil {
		return fmt.Errorf("%s: %w", stmt, err)
	}
	return nil
}

func (d *demo) fill(ctx context.Context) error {
	for _, stmt := range []string{
		"CREATE DATABASE shop",
		"CREATE TABLE shop.payments (id INT AUTO_INCREMENT PRIMARY KEY, card VARCHAR(100))",
	} {
		if err := d.exec(ctx, stmt); err != nil {
			return err
		}
	}
	if err := d.write(ctx); err != nil {
		return err
	}
	d.note("table payments: %d rows, each with the card number %s", d.rows, pattern)
	return nil
}

// write adds rows.
func (d *demo) write(ctx context.Context) error {
	const insert = "INSERT INTO shop.payments (card) SELECT ? FROM shop.seq_1_to_%d"
	if err := d.exec(ctx, fmt.Sprintf(insert, batch), pattern); err != nil {
		return err
	}
	d.rows += batch
	return nil
}

// read checks that all rows are there.
func (d *demo) read(ctx context.Context) error {
	var n int
	if err := d.mariadb.DB().QueryRowContext(ctx, "SELECT COUNT(*) FROM shop.payments WHERE card = ?", pattern).Scan(&n); err != nil {
		return fmt.Errorf("reading the table: %w", err)
	}
	if n != d.rows {
		return fmt.Errorf("the table has %d rows, %d were written", n, d.rows)
	}
	return nil
}

// search looks for the card number in all that MariaDB has written: tables, redo log and
// binary log.
func (d *demo) search(ctx context.Context) error {
	found, searched, err := tde.FindPlaintext(d.mariadb.Dir, []byte(pattern))
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return fmt.Errorf("the card number is readable in %s, at byte %d", found[0].File, found[0].Offset)
	}
	control := filepath.Join(d.mariadb.Dir, "control")
	if err := os.WriteFile(control, []byte(pattern), 0o600); err != nil {
		return err
	}
	if found, _, err := tde.FindPlaintext(d.mariadb.Dir, []byte(pattern)); err != nil || len(found) != 1 || found[0].File != control {
		return fmt.Errorf("the search does not find the card number in %s: %v, %v", control, found, err)
	}
	if err := os.Remove(control); err != nil {
		return err
	}
	d.note("searched %d MB that MariaDB has written: the card number is in no file", searched>>20)
	return nil
}

// rotate makes two versions: MariaDB moves pages that are more than one behind.
func (d *demo) rotate(ctx context.Context) error {
	version := 0
	for range 2 {
		k, err := d.c.RotateNamedKey(ctx, database, "1")
		if err != nil {
			return err
		}
		version = k.Version
	}
	begin := time.Now()
	err := devserver.Poll(ctx, func() error {
		var oldest int
		err := d.mariadb.DB().QueryRowContext(ctx, `SELECT MIN_KEY_VERSION FROM information_schema.INNODB_TABLESPACES_ENCRYPTION
			WHERE NAME = 'shop/payments'`).Scan(&oldest)
		if err == nil && oldest != version {
			err = fmt.Errorf("the oldest page of the table has version %d of its key, want %d", oldest, version)
		}
		return err
	})
	if err != nil {
		return err
	}
	d.note("rotated twice: kmsd database key rotate shop 1; MariaDB has moved every page to version %d, after %.1f s",
		version, time.Since(begin).Seconds())
	return d.read(ctx)
}

func (d *demo) killDriver(ctx context.Context) error {
	g, err := d.c.Group(ctx, devserver.DefaultGroup)
	if err != nil {
		return err
	}
	m, err := devserver.Member(g, g.Primary)
	if err != nil {
		return err
	}
	if err := kill(m); err != nil {
		return err
	}
	if err := errors.Join(d.write(ctx), d.read(ctx)); err != nil {
		return err
	}
	if err := d.exec(ctx, "CREATE TABLE shop.made_meanwhile (id INT PRIMARY KEY)"); err != nil {
		return err
	}
	d.note("SIGKILL to the driver of %s: MariaDB writes, reads and makes tables", m.Name)
	_, err = devserver.AwaitWhole(ctx, d.c)
	return err
}

// kill ends the driver of a member. Process 0 would be this program itself.
func kill(m api.Member) error {
	if m.DriverPID <= 0 {
		return fmt.Errorf("member %s, which is %s, has no driver to kill", m.Name, m.State)
	}
	return syscall.Kill(m.DriverPID, syscall.SIGKILL)
}

// loseAll takes every token away for longer than MariaDB believes in a version.
func (d *demo) loseAll(ctx context.Context) error {
	g, err := d.c.Group(ctx, devserver.DefaultGroup)
	if err != nil {
		return err
	}
	for _, m := range g.Members {
		path := filepath.Join(d.kmsd.Dir, "tokens", m.Name)
		if err := os.Rename(path, path+".away"); err != nil {
			return err
		}
		if err := kill(m); err != nil {
			return err
		}
	}
	lost := time.Now()
	for time.Since(lost) < 4*believed {
		if err := errors.Join(d.write(ctx), d.read(ctx)); err != nil {
			return err
		}
	}
	d.note("no HSM for %.1f s: kmsd closes its port for databases, and MariaDB goes on with the keys in its memory",
		time.Since(lost).Seconds())
	for _, m := range g.Members {
		path := filepath.Join(d.kmsd.Dir, "tokens", m.Name)
		if err := os.Rename(path+".away", path); err != nil {
			return err
		}
	}
	if _, err := devserver.AwaitWhole(ctx, d.c); err != nil {
		return err
	}
	// kmsd opens it a moment later, and a MariaDB that finds it closed does not start.
	if err := devserver.Poll(ctx, func() error { return d.connects(ctx) }); err != nil {
		return err
	}
	d.note("the HSMs are back, and so is the port")
	return nil
}

// connects looks whether kmsd listens for databases.
func (d *demo) connects(ctx context.Context) error {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", strings.TrimPrefix(d.kmsd.Env.VaultAddr, "https://"))
	if err != nil {
		return err
	}
	return conn.Close()
}

func (d *demo) restart(ctx context.Context) error {
	d.mariadb.Kill()
	if err := d.mariadb.Start(ctx); err != nil {
		return err
	}
	if err := d.read(ctx); err != nil {
		return err
	}
	d.note("SIGKILL to MariaDB and a new start: all %d rows are there, and all of its keys came from kmsd", d.rows)
	return d.search(ctx)
}
