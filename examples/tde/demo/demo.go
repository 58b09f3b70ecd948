package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"kmsd/examples/tde"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

// demo is the story and everything in it.
type demo struct {
	bin, dir string
	account  *account
	load     *load

	server    *devserver.Server
	svc       *client.Client
	databases []*database
}

// frozenFor is how long the second driver hangs, at least: longer than the probe
// interval of 2 s, after which a member that owes an answer gets no more work.
const frozenFor = 4 * time.Second

func (d *demo) run(ctx context.Context) error {
	steps := []func(context.Context) error{
		d.start, d.populate, d.killDriver, d.freezeDriver, d.rekey, d.restart, d.verifyRows, d.verifyVersions, d.searchPlaintext,
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			d.load.end()
			return errors.Join(err, d.load.first)
		}
	}
	return d.conclude(ctx)
}

// close lets go of what an early end has left.
func (d *demo) close() {
	d.load.end()
	for _, b := range d.databases {
		b.db.Close()
	}
	if d.svc != nil {
		d.svc.Close()
	}
	if d.server != nil {
		d.server.Kill()
	}
}

func (d *demo) start(ctx context.Context) error {
	d.account.note("starting kmsd with three SoftHSM tokens")
	if err := d.connect(ctx); err != nil {
		return err
	}
	g, err := devserver.AwaitWhole(ctx, d.svc)
	if err != nil {
		return err
	}
	d.account.note("kmsd answers at %s; %s are active", d.server.Env.Addr, strings.Join(memberNames(g), ", "))
	return nil
}

// connect starts kmsd and makes a client for it.
func (d *demo) connect(ctx context.Context) (err error) {
	d.server, err = devserver.Start(ctx, devserver.Config{Bin: d.bin, Dir: filepath.Join(d.dir, "kmsd")})
	if err != nil {
		return err
	}
	d.svc, err = d.server.Env.Client(0)
	return err
}

func (d *demo) group(ctx context.Context) (api.Group, error) {
	return d.svc.Group(ctx, devserver.DefaultGroup)
}

func memberNames(g api.Group) []string {
	var names []string
	for _, m := range g.Members {
		names = append(names, m.Name)
	}
	return names
}

// populate makes the first databases and puts them under load.
func (d *demo) populate(ctx context.Context) error {
	for _, name := range []string{"shop", "bank"} {
		if err := d.addDatabase(ctx, name); err != nil {
			return err
		}
	}
	for i := range 4 {
		d.load.keyClient(d.svc, d.databases[i%2].name)
	}
	d.account.note("databases shop and bank: two tables each, written to from now on; 4 clients wrap and unwrap")
	return pause(ctx, 2*time.Second)
}

// addDatabase makes a database with two tables and starts to write to them.
func (d *demo) addDatabase(ctx context.Context, name string) error {
	b, err := createDatabase(ctx, d.load, d.svc, filepath.Join(d.dir, "data"), name, "orders", "people")
	if err != nil {
		return err
	}
	d.databases = append(d.databases, b)
	for _, t := range b.tables {
		t.write(d.load)
	}
	return nil
}

// killDriver kills the driver of the primary, the member on which keys are made.
func (d *demo) killDriver(ctx context.Context) error {
	g, err := d.group(ctx)
	if err != nil {
		return err
	}
	m, err := devserver.Member(g, g.Primary)
	if err != nil {
		return err
	}
	d.account.note("SIGKILL to the driver of %s, the primary (pid %d)", m.Name, m.DriverPID)
	killed := time.Now()
	if err := signalDriver(m, syscall.SIGKILL); err != nil {
		return err
	}
	if err := d.addDatabase(ctx, "travel"); err != nil {
		return err
	}
	d.account.note("database travel made meanwhile")
	return d.recovered(ctx, m, "SIGKILL", killed)
}

// freezeDriver makes the driver of another member hang and wakes it up again.
func (d *demo) freezeDriver(ctx context.Context) error {
	g, err := d.group(ctx)
	if err != nil {
		return err
	}
	m := g.Members[slices.IndexFunc(g.Members, func(m api.Member) bool { return m.Name != g.Primary })]
	d.account.note("SIGSTOP to the driver of %s (pid %d)", m.Name, m.DriverPID)
	if err := signalDriver(m, syscall.SIGSTOP); err != nil {
		return err
	}
	thaw := func() error { return signalDriver(m, syscall.SIGCONT) }
	frozen := time.Now()
	for _, name := range []string{"clinic", "school"} {
		if err := d.addDatabase(ctx, name); err != nil {
			return errors.Join(err, thaw())
		}
	}
	d.account.note("databases clinic and school made meanwhile")
	if err := pause(ctx, time.Until(frozen.Add(frozenFor))); err != nil {
		return errors.Join(err, thaw())
	}
	g, err = d.group(ctx)
	if err != nil {
		return errors.Join(err, thaw())
	}
	now, err := devserver.Member(g, m.Name)
	if err != nil {
		return errors.Join(err, thaw())
	}
	d.account.note("%s is %s (%s); SIGCONT", now.Name, now.State, now.Reason)
	woken := time.Now()
	if err := thaw(); err != nil {
		return err
	}
	return d.recovered(ctx, m, "SIGSTOP and SIGCONT", woken)
}

// signalDriver sends a signal to the driver of a member. Process 0 would be this
// program itself.
func signalDriver(m api.Member, sig syscall.Signal) error {
	if m.DriverPID <= 0 {
		return fmt.Errorf("member %s, which is %s, has no driver to send %v to", m.Name, m.State, sig)
	}
	if err := syscall.Kill(m.DriverPID, sig); err != nil {
		return fmt.Errorf("sending %v to the driver of %s: %w", sig, m.Name, err)
	}
	return nil
}

// recovered waits until the group is whole and notes how long that took.
func (d *demo) recovered(ctx context.Context, m api.Member, signal string, since time.Time) error {
	g, err := devserver.AwaitWhole(ctx, d.svc)
	if err != nil {
		return err
	}
	took := time.Since(since)
	d.account.note("%s is active again after %.1f s and holds all %d keys", m.Name, took.Seconds(), g.Keys)
	d.account.fact(signal+" of "+m.Name, "active with all %d keys again after %.1f s", g.Keys, took.Seconds())
	return pause(ctx, time.Second)
}

// rekey gives every master key a new version and wraps every table key anew.
func (d *demo) rekey(ctx context.Context) error {
	tables := 0
	for _, b := range d.databases {
		err := d.load.do(kindMake, "re-key a database", func() error {
			_, err := b.db.Rekey(ctx)
			return err
		})
		if err != nil {
			return err
		}
		tables += len(b.tables)
	}
	d.account.note("re-keyed: a new version of %d master keys, %d table keys rewrapped, tables in use all the time",
		len(d.databases), tables)
	return pause(ctx, time.Second)
}

// restart ends kmsd and starts it again on the same tokens. There is only one kmsd
// here, so the load ends first.
func (d *demo) restart(ctx context.Context) error {
	d.load.end()
	for _, b := range d.databases {
		if err := b.db.Close(); err != nil {
			return err
		}
	}
	if err := d.svc.Close(); err != nil {
		return err
	}
	if err := d.server.Stop(ctx); err != nil {
		return err
	}
	d.account.note("load ended, databases closed, kmsd stopped with SIGTERM")
	if err := d.connect(ctx); err != nil {
		return err
	}
	if _, err := devserver.AwaitWhole(ctx, d.svc); err != nil {
		return err
	}
	d.account.note("kmsd started again on the same tokens")
	return nil
}

func (d *demo) verifyRows(ctx context.Context) error {
	rows, tables := 0, 0
	for _, b := range d.databases {
		if err := b.reopen(ctx, d.load, d.svc); err != nil {
			return err
		}
		for _, t := range b.tables {
			if err := t.verify(); err != nil {
				return err
			}
			rows += t.rows
			tables++
		}
	}
	d.account.note("%d tables opened; each of their %s rows is as it was written", tables, thousands(rows))
	d.account.fact("rows", "%s written to %d tables, all read back after the restart", thousands(rows), tables)
	return nil
}

// verifyVersions makes sure that the re-key has reached every table.
func (d *demo) verifyVersions(ctx context.Context) error {
	for _, b := range d.databases {
		key, err := d.svc.Key(ctx, b.name)
		if err != nil {
			return err
		}
		for _, t := range b.tables {
			wrapped, aad := t.t.Envelope()
			results, err := d.svc.Batch(ctx, api.OpUnwrap, b.name, []api.Item{{Wrapped: wrapped, AAD: aad}})
			if err != nil {
				return err
			}
			r := results[0]
			clear(r.Plaintext)
			if r.Error != nil {
				return fmt.Errorf("unwrapping the key of %s.%s: %w", b.name, t.name, r.Error)
			}
			if r.Version != key.Primary || key.Primary < 2 {
				return fmt.Errorf("the key of %s.%s is wrapped with version %d, not with version %d", b.name, t.name, r.Version, key.Primary)
			}
		}
	}
	return nil
}

// searchPlaintext looks for rows and table keys in the clear, in everything that
// the databases and kmsd have written.
func (d *demo) searchPlaintext(ctx context.Context) error {
	markers := [][]byte{[]byte(marker)}
	for _, b := range d.databases {
		for _, t := range b.tables {
			wrapped, aad := t.t.Envelope()
			key, err := d.svc.Unwrap(ctx, b.name, wrapped, aad)
			if err != nil {
				return err
			}
			defer clear(key)
			markers = append(markers, key)
		}
	}
	found, searched, err := tde.FindPlaintext(d.dir, markers...)
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return fmt.Errorf("plaintext on disk: %s at byte %d", found[0].File, found[0].Offset)
	}
	// The same search finds a marker that is there.
	control := filepath.Join(d.dir, "control")
	if err := os.WriteFile(control, []byte("in the clear: "+marker), 0o600); err != nil {
		return err
	}
	if found, _, err := tde.FindPlaintext(d.dir, markers...); err != nil || len(found) != 1 || found[0].File != control {
		return fmt.Errorf("the search did not find the marker in %s: found %v, %v", control, found, err)
	}
	d.account.note("no row and no table key is readable in %s bytes on disk", thousands(int(searched)))
	d.account.fact("plaintext on disk", "none in %s bytes (the search does find a control file)", thousands(int(searched)))
	return nil
}

// conclude prints the account and says whether everything held.
func (d *demo) conclude(ctx context.Context) error {
	g, err := d.group(ctx)
	if err != nil {
		return err
	}
	var verified []api.Verification
	var faults []error
	for _, b := range d.databases {
		v, err := d.svc.Verify(ctx, b.name)
		if err != nil {
			return err
		}
		if !v.OK {
			faults = append(faults, fmt.Errorf("key %s is not whole on every HSM", v.Name))
		}
		verified = append(verified, v)
	}
	l := d.load
	if l.failures > 0 {
		faults = append(faults, fmt.Errorf("%d operations failed, the first: %w", l.failures, l.first))
	}
	d.account.fact("key operations", "%s: wrap %s, unwrap %s, datakey %s, and tables made and opened", thousands(l.total()),
		thousands(l.counts["wrap"]), thousands(l.counts["unwrap"]), thousands(l.counts["datakey"]))
	d.account.fact("failed", "%d", l.failures)
	d.account.fact("longest stall", "%s", d.account.timing(l.slowest[kindKey]))
	d.account.fact("longest key management", "%s", d.account.timing(l.slowest[kindMake]))
	d.account.fact("longest page operation", "%s; no HSM has a part in it", d.account.timing(l.slowest[kindPage]))
	d.account.summary(memberNames(g), verified)

	if err := d.server.Stop(ctx); err != nil {
		faults = append(faults, err)
	}
	if err := errors.Join(faults...); err != nil {
		return err
	}
	fmt.Fprintf(d.account.w, "\nEverything held, in %.0f s.\n", time.Since(d.account.begin).Seconds())
	return nil
}

// pause lets the load run.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
