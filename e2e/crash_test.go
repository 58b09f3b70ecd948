package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"kmsd/e2e/look"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

// crashes is how often kmsd is killed while it makes keys.
const crashes = 50

func TestNoKeyIsLostOrHalfMadeWhenKmsdIsKilled(t *testing.T) {
	dir := t.TempDir()
	listen := freeAddress(t)
	acks := &acknowledged{}
	// On a machine that is too slow for a key between two crashes there are more of them.
	for round := 0; round < crashes || acks.count() < crashes && round < 4*crashes; round++ {
		s := startIn(t, dir, listen)
		c := dial(t, s)
		var drivers []int
		for _, m := range group(t, c).Members {
			drivers = append(drivers, m.DriverPID)
		}
		stop := makeKeys(t, c, acks, round)
		// On a slow machine keys are long in the making, and kmsd is killed as much later.
		wait(t, rand.N(6*acks.step()))
		s.Kill()
		stop()
		c.Close()
		drivers = slices.DeleteFunc(drivers, func(pid int) bool { return pid == 0 })
		awaitGone(t, recoveredIn, drivers...)
	}

	s := startIn(t, dir, listen)
	c := dial(t, s)
	g, took := awaitWhole(t, c, recoveredIn)
	t.Logf("%d versions of keys were acknowledged, and %d keys destroyed; the catalog has %d living versions; whole %v after the start",
		len(acks.keys), len(acks.destroyed), g.Keys, took)
	if len(acks.keys) < crashes {
		t.Errorf("only %d keys were acknowledged; it proves nothing below %d", len(acks.keys), crashes)
	}
	for _, k := range acks.keys {
		got, err := c.Unwrap(t.Context(), k.name, k.wrapped, k.aad())
		if err != nil || !bytes.Equal(got, k.plain) {
			t.Errorf("key %s was acknowledged and does not unwrap: %v", k.name, err)
		}
	}
	for _, name := range acks.destroyed {
		if k, err := c.Key(t.Context(), name); err != nil || k.State != api.StateDestroyed {
			t.Errorf("key %s was destroyed and is %s, %v", name, k.State, err)
		}
	}
	allVerify(t, c)
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	cfg := configOf(t, s)
	cat := readCatalog(t, cfg.Catalog.Bolt.Path)
	for _, m := range cfg.Groups[0].Members {
		checkToken(t, cfg, m.Name, acks, cat)
	}
}

// checkToken compares a token with the catalog, past kmsd.
func checkToken(t *testing.T, cfg look.Config, member string, acks *acknowledged, cat look.Catalog) {
	t.Helper()
	d := openToken(t, cfg, member)
	objects, err := d.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	held := map[string]bool{}
	for _, o := range objects {
		id := o.ID.String()
		held[id] = true
		if _, living := cat.Living[id]; !living {
			t.Errorf("%s holds %s (%s), which the catalog does not know as living (destroyed: %v)", member, id, o.Label, cat.Gone[id])
		}
	}
	for id := range cat.Living {
		if !held[id] {
			t.Errorf("%s does not hold %s", member, id)
		}
	}
	for _, k := range acks.keys {
		got, err := look.Unwrap(t.Context(), d, k.wrapped, k.aad())
		if err != nil || !bytes.Equal(got, k.plain) {
			t.Errorf("%s does not unwrap what key %s wrapped: %v", member, k.name, err)
		}
	}
	t.Logf("%s holds %d keys, the catalog %d", member, len(held), len(cat.Living))
}

// acknowledged is what kmsd has said yes to.
type acknowledged struct {
	mu        sync.Mutex // guards what follows
	keys      []ackedKey
	destroyed []string      // names
	making    time.Duration // that the last key took; zero: none yet
}

// count is how many versions of keys have wrapped something.
func (a *acknowledged) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.keys)
}

// step returns how long the making of a key takes, as far as is known.
func (a *acknowledged) step() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return max(a.making, 25*time.Millisecond)
}

// create makes a key.
func (a *acknowledged) create(ctx context.Context, c *client.Client, name string) error {
	begin := time.Now()
	if _, err := c.CreateMasterKey(ctx, name, api.KeyOptions{}); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.making = time.Since(begin)
	return nil
}

type ackedKey struct {
	name           string
	plain, wrapped []byte
}

func (k ackedKey) aad() []byte { return []byte("crash " + k.name) }

// makeKeys makes, rotates and destroys keys until kmsd is gone or stop is called, which waits
// for the last request.
func makeKeys(t *testing.T, c *client.Client, acks *acknowledged, round int) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for worker := range 2 {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				name := fmt.Sprintf("key-%d-%d-%d", round, worker, n)
				work := acks.makeOne
				if rand.IntN(4) == 0 {
					work = acks.destroyOne
				}
				if err := work(ctx, c, name); err != nil {
					if errors.Is(err, api.ErrInternal) || errors.Is(err, api.ErrExists) {
						t.Errorf("making %s: %v", name, err)
					}
					return
				}
			}
		})
	}
	return func() { cancel(); wg.Wait() }
}

// makeOne makes a key, wraps with it, rotates it and wraps again.
func (a *acknowledged) makeOne(ctx context.Context, c *client.Client, name string) error {
	if err := a.create(ctx, c, name); err != nil {
		return err
	}
	if err := a.wrapOne(ctx, c, name); err != nil {
		return err
	}
	if _, err := c.Rotate(ctx, name); err != nil {
		return err
	}
	return a.wrapOne(ctx, c, name)
}

// destroyOne makes a key and destroys it at once.
func (a *acknowledged) destroyOne(ctx context.Context, c *client.Client, name string) error {
	if err := a.create(ctx, c, name); err != nil {
		return err
	}
	if _, err := c.Destroy(ctx, name, 0); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.destroyed = append(a.destroyed, name)
	return nil
}

func (a *acknowledged) wrapOne(ctx context.Context, c *client.Client, name string) (err error) {
	k := ackedKey{name: name, plain: random(32)}
	if k.wrapped, err = c.Wrap(ctx, name, k.plain, k.aad()); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.keys = append(a.keys, k)
	return nil
}

// freeAddress returns an address on which nothing listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestDriversEndWithKmsd(t *testing.T) {
	s := start(t)
	var pids []int
	for i, m := range group(t, dial(t, s)).Members {
		pids = append(pids, m.DriverPID)
		if i == 1 {
			send(t, m.DriverPID, syscall.SIGSTOP) // also one that hangs
		}
	}
	begin := time.Now()
	s.Kill()
	awaitGone(t, recoveredIn, pids...)
	t.Logf("gone %v after kmsd", time.Since(begin))
}
