package daemon_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"iter"
	"math/big"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/cmd/kmsd/internal/audit"
	"kmsd/cmd/kmsd/internal/daemon"
	"kmsd/cmd/kmsd/internal/vaultkv"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

// world is a service of two groups as a gate sees it.
type world struct {
	apitest.Memory

	mu     sync.Mutex // guards the rest
	ready  map[string]bool
	lost   map[string]bool
	groups map[string]string // :: database → group
	events chan api.Event
}

func newWorld() *world {
	return &world{
		ready: map[string]bool{}, lost: map[string]bool{"a": true, "b": true}, groups: map[string]string{"shop": "a", "erp": "b"},
		events: make(chan api.Event, 10),
	}
}

// serves says what a group does from now on, with an event if there is a type for it.
func (w *world) serves(group string, is bool, event string) {
	w.mu.Lock()
	w.ready[group], w.lost[group] = is, !is
	w.mu.Unlock()
	if event != "" {
		w.events <- api.Event{Type: event, Group: group}
	}
}

func (w *world) Ready() (r api.Readiness) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, g := range []string{"a", "b"} {
		r.Members = append(r.Members, api.MemberReadiness{Group: g, Member: "hsm", OK: w.ready[g]})
	}
	return r
}

func (w *world) Status() (s api.Status) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, g := range []string{"a", "b"} {
		state := api.GroupNormal
		if w.lost[g] {
			state = api.GroupLost
		}
		s.Groups = append(s.Groups, api.Group{Name: g, State: state})
	}
	return s
}

func (w *world) Events(ctx context.Context) iter.Seq[api.Event] {
	return func(yield func(api.Event) bool) {
		for {
			select {
			case <-ctx.Done():
				return
			case e := <-w.events:
				if !yield(e) {
					return
				}
			}
		}
	}
}

func (w *world) Database(_ context.Context, name string) (api.Database, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if g, ok := w.groups[name]; ok {
		return api.Database{Name: name, Group: g}, nil
	}
	return api.Database{}, api.NewError(api.CodeNotFound, "there is no database "+name, nil)
}

// everybody may do anything, and nobody writes it down.
type everybody struct{}

func (everybody) Authenticate(context.Context, string) (vaultkv.Caller, error) {
	return everybody{}, nil
}
func (everybody) Name() string             { return "somebody" }
func (everybody) May(string, string) bool  { return true }
func (everybody) Write(audit.Record) error { return nil }

// gated is a gate that runs.
type gated struct {
	daemon.Gate
	addr string
	log  *buffer
	end  func()
}

// gate runs a gate until the test ends. before may look at it first.
func gate(t *testing.T, w *world, databases []string, before func(daemon.Gate)) *gated {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	h, err := vaultkv.New(vaultkv.Config{Keys: w, Auth: everybody{}, Audit: everybody{}, Mounts: map[string]vaultkv.Mount{"m": {Database: "shop"}}})
	if err != nil {
		t.Fatal(err)
	}
	g := &gated{addr: freeAddr(t), log: &buffer{}}
	conf := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	g.Gate = daemon.NewGate(g.addr, databases, w, h, conf, hclog.New(&hclog.LoggerOptions{Output: g.log}))
	if before != nil {
		before(g.Gate)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- g.Run(ctx, func() {
			if conn, err := net.Dial("tcp", g.addr); err == nil {
				conn.Close()
				t.Error("it calls itself closed and is open")
			}
		})
	}()
	g.end = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(g.end)
	return g
}

// freeAddr finds an address that nobody serves, and no other process will.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", devserver.OwnHost()+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// await waits until the gate is open, or closed.
func (g *gated) await(t *testing.T, open bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := devserver.Poll(ctx, func() error {
		conn, err := net.Dial("tcp", g.addr)
		if err == nil {
			conn.Close()
		}
		if (err == nil) != open {
			return errors.New("it is not")
		}
		return nil
	})
	if err != nil {
		t.Fatalf("open %v: %v\n%s", open, err, g.log)
	}
}

func TestTheGateIsClosedUntilARoundTripHasSucceeded(t *testing.T) {
	w := newWorld()
	g := gate(t, w, []string{"shop"}, nil)
	if err := g.Await(t.Context()); err == nil || !strings.Contains(err.Error(), "every group is lost") {
		t.Errorf("awaiting a lost group: %v", err)
	}
	w.serves("a", true, "")
	g.Gate.Follow("shop") // it is no news, but lets it look at once
	g.await(t, true)
	if err := g.Await(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestTheGateFollowsTheEventsOfTheGroup(t *testing.T) {
	w := newWorld()
	g := gate(t, w, []string{"shop"}, daemon.Gate.Patient) // events alone move it
	for range 3 {
		w.serves("a", true, api.EventMember)
		g.await(t, true)
		began := time.Now()
		w.serves("a", false, api.EventGroup)
		g.await(t, false)
		t.Logf("closed %v after the event", time.Since(began))
	}
	w.serves("a", true, api.EventDropped) // whatever it was
	g.await(t, true)
}

func TestTheGateIsThereForTheGroupsThatMountsUse(t *testing.T) {
	w := newWorld()
	w.serves("b", true, "")
	g := gate(t, w, []string{"shop"}, daemon.Gate.Patient)
	w.events <- api.Event{Type: api.EventGroup}
	g.Follow("erp") // in the group that serves
	g.await(t, true)
	g.Follow("shop") // in the one that does not
	g.await(t, false)
	g.Follow("shop", "later") // nobody knows where that will be
	g.await(t, true)
	w.serves("b", false, api.EventGroup)
	g.await(t, false)
	w.mu.Lock()
	w.groups["later"] = "a" // it has been made
	w.mu.Unlock()
	w.serves("b", true, api.EventGroup)
	w.serves("a", true, api.EventGroup)
	g.await(t, true)
}

func TestTheGateWaitsForItsPort(t *testing.T) {
	w := newWorld()
	var other net.Listener
	g := gate(t, w, []string{"shop"}, nil)
	other, err := net.Listen("tcp", g.addr)
	if err != nil {
		t.Fatal(err)
	}
	w.serves("a", true, api.EventGroup)
	const said = "the listener for databases cannot be opened; trying again"
	if !g.log.await(said, patience) {
		t.Fatalf("the log does not say so:\n%s", g.log)
	}
	for range 3 {
		w.events <- api.Event{Type: api.EventGroup}
	}
	if g.Serving() {
		t.Error("it counts as open")
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	g.await(t, true)
	if !g.log.await("open for databases", patience) || !g.Serving() {
		t.Error("it does not count as open")
	}
	if n := strings.Count(g.log.String(), said); n != 1 {
		t.Errorf("the log says %d times that the port is taken:\n%s", n, g.log)
	}
}

func TestTheGateLetsRequestsEnd(t *testing.T) {
	w := newWorld()
	if _, err := w.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{}); err != nil {
		t.Fatal(err)
	}
	entered, free := make(chan struct{}), make(chan struct{})
	w.Fail = func(_ context.Context, method, _ string) error {
		if method == "NamedKey" {
			close(entered)
			<-free
		}
		return nil
	}
	g := gate(t, w, []string{"shop"}, nil)
	w.serves("a", true, api.EventGroup)
	g.await(t, true)
	conn, err := tls.Dial("tcp", g.addr, insecure(func(*x509.Certificate) {}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET /v1/m/data/1 HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-entered
	w.serves("a", false, api.EventGroup)
	g.await(t, false)
	w.serves("a", true, api.EventGroup) // it opens again meanwhile
	g.await(t, true)
	close(free)
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 404 ") {
		t.Errorf("the request under way got %q, %v", answer, err)
	}
	g.end()
	if !slices.ContainsFunc(strings.Split(g.log.String(), "\n"), func(line string) bool {
		return strings.Contains(line, "closed for databases") && strings.Contains(line, "kmsd is being stopped")
	}) {
		t.Errorf("the log does not say why it is closed:\n%s", g.log)
	}
}
