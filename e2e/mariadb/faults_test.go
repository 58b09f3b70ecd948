package mariadb_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kmsd/internal/devserver"
	"kmsd/kms/api"
)

// writesIn is within what a few hundred rows are written, on any machine and disk.
const writesIn = 2 * time.Minute

// outage is how long a fault lasts, at least: several times as long as MariaDB believes that
// it knows the newest version of a key, so it does ask.
const outage = 5 * believed

// pagesAtOnce makes MariaDB write pages, and so ask for the newest version, all the time.
const pagesAtOnce = "innodb_max_dirty_pages_pct=0"

// fault is something that happens to kmsd.
type fault struct {
	name   string
	closes bool // nobody listens for databases while it lasts
	stalls bool // nobody answers nor refuses, so pages wait, and rows behind them
	hurt   func(s *site, t *testing.T) (heal func())
}

func TestWritesGoOnWhateverHappensToKmsd(t *testing.T) {
	s := start(t, pagesAtOnce)
	s.do(t, createOrders)
	w := s.startWriters(t, [writerCount]int{})
	w.goOn(t, writesIn, 200)
	faults := []fault{
		{"a driver is killed", false, false, (*site).killDriver},
		{"a driver hangs", false, false, (*site).freezeDriver},
		{"kmsd hangs", false, true, (*site).freezeKmsd},
		{"kmsd is killed", true, false, (*site).killKmsd},
		{"kmsd is stopped", true, false, (*site).stopKmsd},
		{"all drivers hang", true, false, (*site).freezeDrivers},
		{"no token is there", true, false, (*site).takeTokens},
	}
	for i, f := range faults {
		if !t.Run(f.name, func(t *testing.T) { s.withstands(t, w, f, i) }) {
			t.FailNow() // it may not have been healed
		}
	}
	acked, failures := w.end()
	if len(failures) > 0 {
		t.Fatal(failures)
	}
	s.startsOnlyWithItsKeys(t)
	s.hasRows(t, acked)
	for i := range faults {
		s.isSound(t, fmt.Sprintf("shop.after_%d", i))
	}
	s.neverSaidNotFound(t)
}

// withstands checks that rows are written and tables are made during a fault, unless it stalls
// MariaDB, and that keys which MariaDB has never had are to be had after it.
func (s *site) withstands(t *testing.T, w *writers, f fault, i int) {
	t.Helper()
	before := s.mariadb.Log()
	key := fmt.Sprint(10 + i) // MariaDB has never seen it
	s.makeKey(t, key)
	w.takeLongest()
	heal := f.hurt(s, t)
	if f.closes {
		s.awaitNoListener(t)
	}
	if f.stalls {
		select {
		case <-time.After(outage):
		case <-t.Context().Done():
		}
	} else {
		for begin := time.Now(); time.Since(begin) < outage; {
			w.goOn(t, writesIn, 20)
		}
		s.do(t, fmt.Sprintf("CREATE TABLE shop.during_%d (id INT PRIMARY KEY)", i)) // with key 1, which it has
	}
	heal()
	s.awaitListener(t)
	s.awaitWhole(t)
	w.goOn(t, writesIn, 20)
	t.Logf("the slowest insert took %v", w.takeLongest())
	s.do(t, fmt.Sprintf("CREATE TABLE shop.after_%d (id INT PRIMARY KEY) ENCRYPTION_KEY_ID=%s", i, key))
	s.do(t, fmt.Sprintf("INSERT INTO shop.after_%d SELECT * FROM shop.seq_1_to_1000", i))
	s.isSound(t, "shop.orders")
	s.hasNoComplaint(t, before)
}

// startsOnlyWithItsKeys starts MariaDB while there is no HSM, which fails and hurts nothing,
// and again when there is.
func (s *site) startsOnlyWithItsKeys(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	if err := s.mariadb.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	bring := s.takeTokens(t)
	s.awaitNoListener(t)
	begin := time.Now()
	err := s.mariadb.Start(ctx)
	t.Logf("without an HSM MariaDB ended after %v", time.Since(begin))
	if err == nil || !strings.Contains(err.Error(), "exit status") || !strings.Contains(err.Error(), "cannot enable encryption") {
		t.Errorf("without an HSM: %v; want that it ends by itself and says that it has no keys", err)
	}
	bring()
	s.awaitListener(t)
	before := s.mariadb.Log()
	s.startMariaDB(t)
	s.hasNoComplaint(t, before)
}

// neverSaidNotFound reads in the audit log how all requests of MariaDB ended. It asks for keys
// that are there only, so none may ever have been said not to be.
func (s *site) neverSaidNotFound(t *testing.T) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.kmsd.Dir, "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	given := 0
	for line := range strings.Lines(string(b)) {
		if !strings.Contains(line, `"action":"named-get"`) {
			continue
		}
		if strings.Contains(line, `"outcome":"not_found"`) {
			t.Errorf("MariaDB was told that a key is not there: %s", line)
		}
		if strings.Contains(line, `"outcome":"ok"`) {
			given++
		}
	}
	if given < 20 {
		t.Errorf("MariaDB has got keys %d times only: it does not ask often enough to meet a fault", given)
	}
	t.Logf("MariaDB has got keys %d times", given)
}

// awaitListener waits until databases can connect.
func (s *site) awaitListener(t *testing.T) {
	t.Helper()
	await(t, recoveredIn, func(ctx context.Context) error { return s.connects(ctx) })
}

// awaitNoListener waits until nobody listens for databases.
func (s *site) awaitNoListener(t *testing.T) {
	t.Helper()
	begin := time.Now()
	await(t, recoveredIn, func(ctx context.Context) error {
		if err := s.connects(ctx); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("databases are not refused: %v", err)
		}
		return nil
	})
	t.Logf("databases are refused after %v", time.Since(begin))
}

func (s *site) connects(ctx context.Context) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", strings.TrimPrefix(s.kmsd.Env.VaultAddr, "https://"))
	if err != nil {
		return err
	}
	return conn.Close()
}

func send(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if pid <= 0 {
		t.Fatalf("there is no process %d to send %v to", pid, sig)
	}
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatalf("sending %v to process %d: %v", sig, pid, err)
	}
}

// primary is the member that is asked first.
func (s *site) primary(t *testing.T) api.Member {
	t.Helper()
	g := s.awaitWhole(t)
	m, err := devserver.Member(g, g.Primary)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (s *site) killDriver(t *testing.T) (heal func()) {
	send(t, s.primary(t).DriverPID, syscall.SIGKILL)
	return func() {}
}

// freeze stops a driver; thaw lets it go on, unless it has been replaced meanwhile.
func freeze(t *testing.T, m api.Member) (thaw func()) {
	t.Helper()
	send(t, m.DriverPID, syscall.SIGSTOP)
	thaw = func() { syscall.Kill(m.DriverPID, syscall.SIGCONT) }
	t.Cleanup(thaw)
	return thaw
}

func (s *site) freezeDriver(t *testing.T) (heal func()) { return freeze(t, s.primary(t)) }

func (s *site) freezeDrivers(t *testing.T) (heal func()) {
	var thaw []func()
	for _, m := range s.awaitWhole(t).Members {
		thaw = append(thaw, freeze(t, m))
	}
	return func() {
		for _, f := range thaw {
			f()
		}
	}
}

func (s *site) freezeKmsd(t *testing.T) (heal func()) {
	t.Helper()
	pid := s.kmsd.PID()
	send(t, pid, syscall.SIGSTOP)
	heal = func() { syscall.Kill(pid, syscall.SIGCONT) }
	t.Cleanup(heal) // also after a failure: the writers could not end
	return heal
}

func (s *site) killKmsd(t *testing.T) (heal func()) {
	s.kmsd.Kill()
	return func() { s.serveAgain(t) }
}

func (s *site) stopKmsd(t *testing.T) (heal func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	if err := s.kmsd.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	return func() { s.serveAgain(t) }
}

// serveAgain starts a kmsd that has ended on the configuration that it left.
func (s *site) serveAgain(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	again, err := devserver.Serve(ctx, devserver.Config{Bin: bin, Dir: s.kmsd.Dir, Env: environment()}, s.kmsd.Env)
	if err != nil {
		t.Fatal(err)
	}
	s.take(t, again)
}

// takeTokens takes the folders of all tokens away and ends their drivers, as when HSMs are
// pulled out; heal puts them back.
func (s *site) takeTokens(t *testing.T) (heal func()) {
	t.Helper()
	g := s.awaitWhole(t)
	path := func(m api.Member) string { return filepath.Join(s.kmsd.Dir, "tokens", m.Name) }
	for _, m := range g.Members {
		if err := os.Rename(path(m), path(m)+".away"); err != nil {
			t.Fatal(err)
		}
		send(t, m.DriverPID, syscall.SIGKILL)
	}
	return func() {
		t.Helper()
		for _, m := range g.Members {
			if err := os.Rename(path(m)+".away", path(m)); err != nil {
				t.Fatal(err)
			}
		}
	}
}
