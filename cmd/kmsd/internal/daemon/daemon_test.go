package daemon_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"kmsd/cmd/kmsd/internal/config"
	"kmsd/cmd/kmsd/internal/daemon"
	"kmsd/cmd/kmsd/internal/dev"
	"kmsd/internal/leaktest"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

// driver makes what passes for a token, and is of no use as a driver: members that
// have it are down.
const driver = "#!/bin/sh\n[ \"$1\" = init-token ]\n"

// drivers is the folder that has it. It is written before any process is started: a fork
// of another goroutine has every open file for a moment, and what is open to be written
// cannot be run.
var drivers string

func TestMain(m *testing.M) {
	var err error
	if drivers, err = os.MkdirTemp("", "kmsd-drivers"); err == nil {
		err = os.WriteFile(filepath.Join(drivers, "kmsd-driver-softhsm"), []byte(driver), 0o755)
	}
	if err != nil {
		panic(err)
	}
	leaktest.Main(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(drivers)
		os.Exit(code)
	}))
}

// patience is for what comes sooner or later.
const patience = time.Minute

// running is a daemon in this process.
type running struct {
	site  *dev.Site
	log   *buffer
	stop  func()
	ended chan error
}

func start(t *testing.T) *running {
	t.Helper()
	return run(t, prepare(t))
}

// prepare makes what a daemon needs.
func prepare(t *testing.T) *dev.Site {
	t.Helper()
	// A short name, for the socket in it.
	dir, err := os.MkdirTemp("", "kmsd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	site, err := dev.Prepare(t.Context(), dev.Options{Dir: dir, Members: 2, Listen: "127.0.0.1:0", DriverDir: drivers})
	if err != nil {
		t.Fatal(err)
	}
	return site
}

// run runs a daemon until the test ends or stop is called.
func run(t *testing.T, site *dev.Site) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{site: site, log: &buffer{}, ended: make(chan error, 1)}
	ready := make(chan struct{})
	go func() {
		r.ended <- daemon.Run(ctx, daemon.Options{
			Load:      func() (*config.Config, error) { return config.Load(site.Config, config.Options{Environ: []string{}}) },
			Listeners: site.Listeners,
			Log:       r.log,
			Ready:     func([]string) error { close(ready); return nil },
		})
	}()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-r.ended; err != nil {
			t.Errorf("the daemon ended with %v", err)
		}
		if err := site.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(r.stop)
	select {
	case <-ready:
	case err := <-r.ended:
		r.ended <- nil
		t.Fatalf("the daemon did not start: %v", err)
	}
	return r
}

func (r *running) client(t *testing.T) *client.Client {
	t.Helper()
	token, err := os.ReadFile(filepath.Join(r.site.Dir, "admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.Settings{Addr: r.site.Addr, CACert: filepath.Join(r.site.Dir, "ca.pem"), Token: strings.TrimSpace(string(token))}.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// await waits until the log holds text.
func (r *running) await(t *testing.T, text string) {
	t.Helper()
	if !r.log.await(text, patience) {
		t.Fatalf("the log never says %q:\n%s", text, r.log)
	}
}

func TestItStartsWhenEveryMemberIsDown(t *testing.T) {
	r := start(t)
	c := r.client(t)
	st, err := c.Groups(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if g := st.Groups[0]; g.State != api.GroupLost || len(g.Members) != 2 {
		t.Errorf("got %+v, want a lost group of two", g)
	}
	if ready, err := c.Ready(t.Context()); err != nil || ready.Ready {
		t.Errorf("ready: got %v %v, want no", ready.Ready, err)
	}
}

func TestTheSocketIsForItsUserOnly(t *testing.T) {
	r := start(t)
	path := filepath.Join(r.site.Dir, "kmsd.sock")
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("got %v %v, want mode 0600", info, err)
	}
	c, err := client.New("unix://"+path, client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Keys(t.Context(), api.ListOptions{}); err != nil {
		t.Errorf("kmsd's own user is not let in: %v", err)
	}
	r.stop()
	if _, err := os.Stat(path); err == nil {
		t.Error("the socket is still there when the daemon has ended")
	}
}

func TestAStaleSocketIsReplaced(t *testing.T) {
	r := start(t)
	r.stop()
	path := filepath.Join(r.site.Dir, "kmsd.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false) // as after SIGKILL
	l.Close()
	again, err := dev.Prepare(t.Context(), dev.Options{Dir: r.site.Dir, Listen: "127.0.0.1:0", DriverDir: drivers})
	if err != nil {
		t.Fatal(err)
	}
	run(t, again)
}

func TestSIGHUPReadsAnewAndKeepsTheOldOnAFault(t *testing.T) {
	r := start(t)
	c := r.client(t)
	tokens := filepath.Join(r.site.Dir, "tokens.yaml")
	good, err := os.ReadFile(tokens)
	if err != nil {
		t.Fatal(err)
	}
	write(t, tokens, "tokens: nonsense\n")
	r.reload(t)
	r.await(t, `"what":"tokens and policies"`)
	r.await(t, "the old stays in force")
	if _, err := c.Keys(t.Context(), api.ListOptions{}); err != nil {
		t.Errorf("the old tokens are not in force: %v", err)
	}
	write(t, tokens, "tokens: []\n")
	r.reload(t)
	if _, err := c.Keys(t.Context(), api.ListOptions{}); err == nil {
		t.Error("a token that was taken out is still let in")
	}
	write(t, tokens, string(good))
	// The audit log was moved away: it goes on in a new file.
	trail := filepath.Join(r.site.Dir, "audit.jsonl")
	if err := os.Rename(trail, trail+".1"); err != nil {
		t.Fatal(err)
	}
	r.reload(t)
	if _, err := c.Keys(t.Context(), api.ListOptions{}); err != nil {
		t.Errorf("the new tokens are not in force: %v", err)
	}
	if b, err := os.ReadFile(trail); err != nil || !bytes.Contains(b, []byte(`"list"`)) {
		t.Errorf("the new audit log holds %s (%v)", b, err)
	}
}

func TestCertificatesAreReadAnew(t *testing.T) {
	r := start(t)
	before := serverSerial(t, r)
	for _, name := range []string{"server.pem", "server.key"} {
		if err := os.Remove(filepath.Join(r.site.Dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	r.reload(t)
	r.await(t, "server.pem: no such file or directory")
	if serverSerial(t, r) != before {
		t.Error("the old certificate is not in force")
	}
	// Another site's certificate, from another CA, is one that is easy to make.
	other := start(t)
	other.stop()
	for _, name := range []string{"server.pem", "server.key", "ca.pem"} {
		b, err := os.ReadFile(filepath.Join(other.site.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(r.site.Dir, name), string(b))
	}
	r.await(t, "read the changed certificates") // without a signal
	if serverSerial(t, r) == before {
		t.Error("the new certificate is not in force")
	}
}

func TestASecondDaemonOnTheSameFilesIsRefused(t *testing.T) {
	r := start(t)
	err := daemon.Run(t.Context(), daemon.Options{
		Load: func() (*config.Config, error) { return config.Load(r.site.Config, config.Options{Environ: []string{}}) },
		Log:  &buffer{},
	})
	if err == nil || !strings.Contains(err.Error(), "another process serves it; use that kmsd") {
		t.Errorf("got %v, want that the address is in use", err)
	}
}

func TestAStopDuringTheStartIsNoFailure(t *testing.T) {
	site := prepare(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := daemon.Run(ctx, daemon.Options{
		Load:      func() (*config.Config, error) { return config.Load(site.Config, config.Options{Environ: []string{}}) },
		Listeners: site.Listeners,
		Log:       &buffer{},
	})
	if err := errors.Join(err, site.Close()); err != nil {
		t.Errorf("got %v", err)
	}
}

// reload sends SIGHUP to the daemon, which is this process, and returns when the last of
// what it asks for has been done; the log then begins with the first. The signal has to be
// caught, so the daemon must run, and no other.
func (r *running) reload(t *testing.T) {
	t.Helper()
	r.log.reset()
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	r.await(t, `"what":"the configuration"`)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// serverSerial returns the serial number of the certificate that new connections
// get.
func serverSerial(t *testing.T, r *running) string {
	t.Helper()
	var serial string
	conf := insecure(func(cert *x509.Certificate) { serial = cert.SerialNumber.String() })
	conn, err := dialTLS(strings.TrimPrefix(r.site.Addr, "https://"), conf)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	return serial
}
