package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sync/errgroup"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

const (
	// defaultDeadline is what a call gets whose context has none.
	defaultDeadline = 30 * time.Second
	// undoTimeout bounds taking back what an operation has half done. It has its own
	// time, since the caller's may be over.
	undoTimeout = 15 * time.Second
)

// KMS is the service over the groups of its configuration. All methods may be
// called concurrently.
type KMS struct {
	log     hclog.Logger
	catalog *catalog.Catalog
	ring    *keyring
	rekeys  *rekeys
	enlist  func(group string, spec api.MemberSpec) (MemberConfig, error) // nil: nobody joins at run time
	formats atomic.Pointer[map[string]string]                             // :: database → Config.Formats; replaced whole, never written to
	masters sync.Map                                                      // :: database → name of its master key, for those that were met

	connector *connector
	events    *hub

	groups []*keyGroup          // in the order of the configuration; fixed after Open
	byName map[string]*keyGroup // :: group → it

	life  context.Context // ends with Close
	stop  context.CancelFunc
	tasks sync.WaitGroup // operations that outlive their callers, janitors, drivers being closed

	mu     sync.Mutex // guards closed, and that no task begins after it
	closed bool
	ended  chan struct{} // closed when all has ended
}

var (
	_ api.Service = (*KMS)(nil)
	_ api.Admin   = (*KMS)(nil)
)

// Open reads the catalog, takes back what a crash has left half done, and starts
// the groups with the members that are there; even none is no error, since absent
// members are recovered later. ctx bounds the opening only; the service lives until
// Close.
func Open(ctx context.Context, cfg Config) (_ *KMS, err error) {
	cfg, err = cfg.checked()
	if err != nil {
		return nil, api.NewError(api.CodeBadRequest, fmt.Sprintf("checking the configuration: %v", err), err)
	}
	refused, err := newPINs()
	if err != nil {
		return nil, translate("opening the key management service", err)
	}
	k := &KMS{
		log: cfg.Logger, catalog: catalog.New(cfg.Catalog), ring: newKeyring(cfg.wraps.orDefault()), events: newHub(cfg.Logger),
		rekeys: newRekeys(), enlist: cfg.Enlist, byName: make(map[string]*keyGroup, len(cfg.Groups)), ended: make(chan struct{}),
	}
	k.SetFormats(cfg.Formats)
	k.life, k.stop = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			err = errors.Join(translate("opening the key management service", err), k.Close())
		}
	}()
	k.connector = &connector{driverDir: cfg.DriverDir, insecure: cfg.Insecure, log: cfg.Logger, pins: refused, tasks: &k.tasks}
	for _, gc := range cfg.Groups {
		seats, err := k.seatsOf(ctx, gc)
		if err != nil {
			return nil, err
		}
		g, err := k.newGroup(gc, seats)
		if err != nil {
			return nil, api.NewError(api.CodeBadRequest, fmt.Sprintf("checking the configuration: %v", err), err)
		}
		k.groups = append(k.groups, g)
		k.byName[g.name] = g
	}
	if err := k.load(ctx); err != nil {
		return nil, err
	}
	return k, k.start(ctx)
}

// load fills the ring and takes back what was begun and never committed. Nothing
// runs yet, so every intent that is there is a crash's.
func (k *KMS) load(ctx context.Context) error {
	if err := k.loadUsages(ctx); err != nil {
		return fmt.Errorf("reading the catalog: %w", err)
	}
	for rec, err := range k.catalog.Keys(ctx, "", "", 0) {
		if err != nil {
			return fmt.Errorf("reading the catalog: %w", err)
		}
		if err := k.ring.put(rec); err != nil {
			return fmt.Errorf("reading the catalog: %w", err)
		}
		if k.byName[rec.Group] == nil {
			k.log.Warn("key belongs to a group that is not configured", "key", rec.Name, "group", rec.Group)
		}
	}
	for in, err := range k.catalog.Intents(ctx) {
		if err != nil {
			return fmt.Errorf("reading the catalog: %w", err)
		}
		g := k.byName[in.Group]
		if g == nil {
			continue // it is taken back when the group is there again
		}
		if _, err := k.catalog.Abandon(ctx, in, g.Names()); err != nil {
			// A full disk keeps nobody from unwrapping; the janitor tries again.
			k.log.Warn("what a crash has left is still to be taken back", "key", in.Key, "version", in.Version, "error", err)
			g.janitor.suspect(in.Key)
			continue
		}
		k.log.Info("took back what a crash has left", "key", in.Key, "version", in.Version, "group", in.Group)
	}
	for _, g := range k.groups {
		if err := k.forgetStrangers(ctx, g); err != nil {
			k.log.Warn("what former members held is still to be forgotten", "group", g.name, "error", err)
		}
	}
	return nil
}

// start starts all groups at once, then their janitors.
func (k *KMS) start(ctx context.Context) error {
	starts, startCtx := errgroup.WithContext(ctx)
	for _, g := range k.groups {
		starts.Go(func() error {
			if err := g.Start(startCtx); err != nil {
				return fmt.Errorf("starting group %s: %w", g.name, err)
			}
			return nil
		})
	}
	if err := starts.Wait(); err != nil {
		return err
	}
	k.tasks.Go(func() { k.keepTally(k.life) })
	if err := k.resumeRekeys(ctx); err != nil {
		return err
	}
	for _, g := range k.groups {
		k.tasks.Go(func() { g.janitor.run(k.life) })
	}
	return nil
}

// Close ends the service: operations under way are broken off and taken back,
// drivers are ended, and readers of events see the end. The catalog's store stays
// open.
func (k *KMS) Close() error {
	k.mu.Lock()
	first := !k.closed
	k.closed = true
	k.mu.Unlock()
	if !first {
		<-k.ended
		return nil
	}
	defer close(k.ended)
	k.stop()
	for _, g := range k.groups {
		g.Close()
	}
	k.tasks.Wait()
	k.events.close()
	return nil
}

// group returns a group by its name; "" is the first.
func (k *KMS) group(name string) (*keyGroup, error) {
	if name == "" {
		return k.groups[0], nil
	}
	if g := k.byName[name]; g != nil {
		return g, nil
	}
	return nil, api.NewError(api.CodeNotFound, fmt.Sprintf("there is no group %q", name), nil)
}

// groupOf returns the group of a key that exists.
func (k *KMS) groupOf(rec catalog.Key) (*keyGroup, error) {
	if g := k.byName[rec.Group]; g != nil {
		return g, nil
	}
	e := api.NewError(api.CodeUnavailable, fmt.Sprintf("key %s belongs to group %q, which is not configured", rec.Name, rec.Group), nil)
	e.Hint = "configure the group again"
	return nil, e
}

// begin gives a call its deadline.
func begin(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, defaultDeadline)
}

// detached runs work that has to come to an end of its own, done or taken back,
// even when its caller goes away or the service is closed: its context ends in both
// cases, and the caller is answered at once, but the work itself goes on until it
// has cleaned up, and Close waits for it.
func detached[T any](ctx context.Context, k *KMS, work func(context.Context) (T, error)) (T, error) {
	type outcome struct {
		value T
		err   error
	}
	var zero T
	k.mu.Lock()
	if k.closed {
		k.mu.Unlock()
		return zero, errClosed
	}
	k.tasks.Add(1)
	k.mu.Unlock()

	done := make(chan outcome, 1)
	go func() {
		defer k.tasks.Done()
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(k.life, func() { cancel(errClosed) })()
		value, err := work(ctx)
		if err != nil && k.life.Err() != nil { // whatever the work has made of that
			err = fmt.Errorf("%w: %v", errClosed, err)
		}
		done <- outcome{value, err}
	}()
	select {
	case o := <-done:
		return o.value, o.err
	case <-ctx.Done():
	}
	select {
	case o := <-done: // both at once: the answer is worth more
		return o.value, o.err
	default:
		return zero, ctx.Err()
	}
}

// cleanup returns a context for taking back what work has half done: the caller's
// end does not end it.
func cleanup(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
}

// update changes the record of a key and makes it known. change may be called more
// than once.
func (k *KMS) update(ctx context.Context, name string, change func(*catalog.Key) error) (catalog.Key, error) {
	cached, err := k.ring.get(name)
	if err != nil {
		return catalog.Key{}, err
	}
	written := false // or may be
	rec, err := k.catalog.UpdateKey(ctx, name, func(rec *catalog.Key) error {
		err := change(rec)
		written = err == nil
		return err
	})
	if err != nil {
		if g := k.byName[cached.rec.Group]; g != nil && written {
			g.janitor.suspect(name)
		}
		return catalog.Key{}, err
	}
	return rec, k.ring.put(rec)
}

// tell publishes and logs what was done to a key.
func (k *KMS) tell(rec catalog.Key, what string, args ...any) {
	k.events.publish(api.Event{Type: "key", Group: rec.Group, Key: rec.Name, To: what})
	k.log.Info("key "+what, slices.Concat([]any{"key", rec.Name, "group", rec.Group}, args)...)
}
