// Package daemon answers: how does kmsd run?
//
// [Run] opens what a configuration names, in an order in which each thing finds
// what it needs, serves until it is told to stop, and closes everything in the
// opposite order. While it runs it is a list of tasks; the first that fails stops
// all.
//
// SIGHUP reads certificates, tokens, policies and the log level anew, reopens the audit
// log, and makes the mounts and the members of the groups those of the file. What cannot be read is
// logged and leaves the old in force. What else has changed and needs a restart is
// logged in words.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"kmsd/cmd/kmsd/internal/audit"
	"kmsd/cmd/kmsd/internal/auth"
	"kmsd/cmd/kmsd/internal/config"
	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/cmd/kmsd/internal/metrics"
	"kmsd/kms"
	"kmsd/kms/catalog/boltcat"
)

// drainTime is what requests under way get to end when kmsd stops.
const drainTime = 10 * time.Second

// settleTime is what requests get to end that were broken off after that. Nobody waits for
// their answers, and nothing in them should take as long.
const settleTime = 2 * time.Second

// Options are what Run needs. They are copied.
type Options struct {
	// Load reads the configuration: once at the start, and again on SIGHUP.
	Load func() (*config.Config, error)
	// Listeners are addresses of the configuration that are open already. Run
	// closes them.
	Listeners map[string]net.Listener
	// Databases are made when they are not there yet. :: name → its master key
	Databases map[string]string
	// Log gets the log, in JSON unless it is a terminal.
	Log io.Writer
	// Ready is called once, when kmsd answers, with the addresses that it serves.
	Ready func(addrs []string) error
}

// Run serves until ctx ends; then it returns nil. The process should be hardened
// already (pluginproto.Harden): PINs come into it here.
func Run(ctx context.Context, opts Options) (err error) {
	// From the very start: the default of SIGHUP would end a kmsd that still opens its
	// HSMs.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	cfg, err := opts.Load()
	if err != nil {
		return errors.Join(err, closeAll(opts.Listeners))
	}
	log := newLogger(opts.Log, cfg.Log.Level)
	for _, w := range cfg.Warnings {
		log.Warn(w)
	}
	doors, err := listen(cfg.Listen, opts.Listeners)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, doors.close()) }()

	principals, err := auth.New(auth.Config{Tokens: cfg.Auth.Tokens, Policies: cfg.Auth.Policies})
	if err != nil {
		return err
	}
	trail, err := audit.Open(cfg.Audit.File)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, trail.Close()) }()
	store, err := boltcat.Open(cfg.Catalog.Bolt.Path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	current := newCurrent(cfg)
	conf := cfg.KMS(store, log)
	conf.Enlist = current.enlist
	service, err := kms.Open(ctx, conf)
	if err != nil && ctx.Err() != nil {
		return nil // told to stop before it could begin
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, service.Close()) }()

	numbers := metrics.New(service, version())
	handler, err := httpapi.New(httpapi.Config{
		Service: service, Auth: guard{principals}, Audit: scribe{trail}, Logger: log.Named("http"),
		Observe: numbers.Observe, Metrics: numbers.Text,
	})
	if err != nil {
		return err
	}
	s := &server{opts: opts, log: log, service: service, started: cfg, current: current, doors: doors, handler: handler, auth: principals, audit: trail}
	if doors.tcp() || cfg.Vault.Listen != "" {
		if s.certs, err = newCertificates(cfg.TLS); err != nil {
			return err
		}
		numbers.Certificate(s.certs.end)
	}
	s.vault, err = s.newVault(log.Named("vault"), func(action, outcome string, took time.Duration) {
		numbers.Observe(action, outcome, 0, nil, took)
	})
	if err != nil {
		return err
	}
	if s.vault != nil {
		numbers.Databases(s.vault.gate.serving.Load)
	}
	return s.run(ctx, hup)
}

// server is a kmsd that has everything open.
type server struct {
	opts    Options
	log     hclog.Logger
	service *kms.KMS
	started *config.Config // what is fixed while kmsd runs is as it says
	current *current       // read by requests while a reload changes it
	doors   doors
	handler *httpapi.Handler
	certs   *certificates // nil without a TCP listener
	vault   *vault        // nil: databases have no listener
	auth    *auth.Auth
	audit   *audit.Log
}

func (s *server) run(ctx context.Context, hup <-chan os.Signal) error {
	tasks, ctx := errgroup.WithContext(ctx)
	// Databases are sent away first: they have keys in memory to go on with.
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	if s.vault != nil {
		tasks.Go(func() error { return s.vault.gate.run(ctx, stop) })
	} else {
		defer context.AfterFunc(ctx, stop)()
	}
	for _, d := range s.doors {
		tasks.Go(func() error { return s.serve(serving, d) })
	}
	tasks.Go(func() error { return s.reloads(ctx, hup) })
	if s.certs != nil {
		tasks.Go(func() error { return s.certs.watch(ctx, s.log) })
	}
	tasks.Go(func() error {
		s.makeDatabases(ctx)
		if s.vault != nil {
			if err := s.vault.gate.await(ctx); err != nil {
				s.log.Warn("databases cannot be served yet", "error", err)
			}
		}
		s.log.Info("ready", "version", version(), "listen", s.doors.addrs())
		if s.opts.Ready == nil {
			return nil
		}
		return s.opts.Ready(s.doors.addrs())
	})
	err := tasks.Wait()
	s.settle()
	s.log.Info("drained; closing")
	return err
}

// settle waits for requests that were broken off, so that all that was done is in the audit
// log when that is closed.
func (s *server) settle() {
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	settled := s.handler.Wait(ctx)
	s.handler.Flush()
	if s.vault != nil {
		settled = s.vault.handler.Wait(ctx) && settled
		s.vault.handler.Flush()
	}
	if !settled {
		s.log.Warn("requests that were broken off have not ended; how they do is not in the audit log", "after", settleTime)
	}
}

// serve serves one listener until ctx ends and its requests have been answered.
func (s *server) serve(ctx context.Context, d door) error {
	var web *http.Server
	var start func() error
	if d.network == "unix" {
		web = httpapi.Server(s.handler, nil, s.log.Named("http"))
		start = func() error { return web.Serve(d.listener) }
	} else {
		most, err := maxConnections()
		if err != nil {
			return err
		}
		web = httpapi.Server(s.handler, s.certs.config(), s.log.Named("http"))
		start = func() error { return web.ServeTLS(newBounded(d.listener, most), "", "") }
	}
	served := make(chan error, 1)
	go func() { served <- start() }()
	select {
	case err := <-served:
		return fmt.Errorf("serving %s: %w", d.addr, err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	if err := web.Shutdown(drain); err != nil {
		s.log.Warn("requests were broken off", "listen", d.addr, "after", drainTime)
		err = web.Close()
		<-served
		return err
	}
	<-served
	return nil
}

// reloads does what SIGHUP asks for.
func (s *server) reloads(ctx context.Context, hup <-chan os.Signal) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			s.reload(ctx)
		}
	}
}

func (s *server) reload(ctx context.Context) {
	steps := []struct {
		what string
		do   func() error
	}{
		{"tokens and policies", s.auth.Reload},
		{"the audit log", s.audit.Reopen},
		{"certificates", s.reloadCerts},
		{"the configuration", func() error { return s.reloadConfig(ctx) }}, // last: it may wait for HSMs
	}
	for _, step := range steps {
		began := time.Now()
		err := step.do()
		s.record(audit.Record{Time: began, Operation: step.what, Duration: time.Since(began)}, err)
		if err != nil {
			s.log.Error("reading anew; the old stays in force", "what", step.what, "error", err)
		} else {
			s.log.Info("read anew", "what", step.what)
		}
	}
}

func (s *server) reloadCerts() error {
	if s.certs == nil {
		return nil
	}
	return s.certs.reload()
}
