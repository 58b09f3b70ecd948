// Package drivertest answers: does a driver keep the contract?
//
// [Run] is the promises of pluginproto.Driver as tests. Every driver passes them: the
// memory one bare and through a real gRPC pipe, SoftHSM and Luna as processes on real
// tokens. A promise that is not tested here is not one that the core may rely on.
package drivertest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"testing"
	"time"

	"kmsd/pluginproto"
)

// Config says how a driver is tested.
type Config struct {
	// NewToken makes an empty token that lives as long as the test. The suite asks
	// for about six of them.
	NewToken func(t *testing.T) Token
	// Types are the key types that the token knows. Empty means all.
	Types []pluginproto.KeyType
}

// Token is one token and how to get at it.
type Token struct {
	// Start makes a driver on the token, not yet open. The suite opens and closes it,
	// and has at most one open on a token at a time.
	Start func(t *testing.T) pluginproto.Driver
	// Settings and PIN are what it is opened with.
	Settings map[string]string
	PIN      []byte
}

// Run tests the contract.
func Run(t *testing.T, cfg Config) {
	if len(cfg.Types) == 0 {
		cfg.Types = pluginproto.KeyTypes()
	}
	t.Run("opening", func(t *testing.T) { testOpen(t, cfg) })
	s := &suite{cfg: cfg, domain: newDomain(), made: map[pluginproto.KeyType]pluginproto.Object{}}
	var a, b pluginproto.TokenInfo
	s.a, a = open(t, cfg.NewToken(t), s.domain)
	s.b, b = open(t, cfg.NewToken(t), s.domain)
	ways := ways(t, a, b)
	s.way = ways[0]
	for _, typ := range cfg.Types {
		t.Run("life of a key, "+string(typ), func(t *testing.T) { s.testKey(t, typ) })
		s.made[typ] = generate(t, s.a, typ)
		t.Run("use, "+string(typ), func(t *testing.T) { s.testUse(t, typ) })
	}
	for _, way := range ways {
		t.Run("clones by "+way.Name, func(t *testing.T) { s.by(way).testClones(t) })
	}
	t.Run("keys that are not there", s.testAbsent)
	t.Run("requests that are wrong", s.testWrong)
	t.Run("random and probe", s.testRandom)
	if slices.Contains(cfg.Types, pluginproto.AES256) {
		t.Run("authenticated encryption", s.testGCM)
		t.Run("many callers", s.testConcurrency)
		t.Run("a context that ends", s.testContext)
	}
}

// suite is two tokens of one domain, with a driver open on each.
type suite struct {
	cfg    Config
	domain []byte
	a, b   pluginproto.Driver
	way    pluginproto.CloneProtocol // how keys go from one to the other

	// made are keys on a, one of each type, which tests use and clone: some take long to make.
	made map[pluginproto.KeyType]pluginproto.Object
}

// by is the suite with another protocol for clones.
func (s *suite) by(way pluginproto.CloneProtocol) *suite {
	other := *s
	other.way = way
	return &other
}

// open starts a driver and opens it; it is closed when the test ends.
func open(t *testing.T, token Token, domain []byte) (pluginproto.Driver, pluginproto.TokenInfo) {
	t.Helper()
	d := token.Start(t)
	info, err := d.Open(limit(t), request(token, domain))
	if err != nil {
		t.Fatalf("opening the token: %v", err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("closing the driver: %v", err)
		}
	})
	return d, info
}

func request(token Token, domain []byte) pluginproto.OpenRequest {
	return pluginproto.OpenRequest{
		Settings: token.Settings,
		PIN:      bytes.Clone(token.PIN),
		Domain:   bytes.Clone(domain),
	}
}

func newDomain() []byte {
	domain := make([]byte, 32)
	rand.Read(domain) // never fails
	return domain
}

func newID() (id pluginproto.KeyID) {
	rand.Read(id[:]) // never fails
	return id
}

// patience is much longer than a good driver takes to answer on a machine that has much
// else to do.
const patience = 5 * time.Minute

// limit is a context that ends long after a good driver has answered.
func limit(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// generate makes a key that is gone again when the test ends.
func generate(t *testing.T, d pluginproto.Driver, typ pluginproto.KeyType) pluginproto.Object {
	t.Helper()
	o, err := d.Generate(limit(t), pluginproto.KeySpec{ID: newID(), Type: typ, Label: "conformance " + string(typ)})
	if err != nil {
		t.Fatalf("generating a key: %v", err)
	}
	removeLater(t, d, o.ID)
	return o
}

func removeLater(t *testing.T, d pluginproto.Driver, id pluginproto.KeyID) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := d.Destroy(ctx, id); err != nil && pluginproto.ClassOf(err) != pluginproto.ClassNotFound {
			t.Errorf("destroying key %s: %v", id, err)
		}
	})
}

// wantClass says that err is a contract error of a class, and which one it was.
func wantClass(t *testing.T, err error, want pluginproto.Class) {
	t.Helper()
	var e *pluginproto.Error
	switch {
	case err == nil:
		t.Errorf("no error, want one of class %s", want)
	case !errors.As(err, &e):
		t.Errorf("error %q (%T) is not a *pluginproto.Error", err, err)
	case e.Class != want:
		t.Errorf("error %q is of class %s, want %s", err, e.Class, want)
	}
}

func wantCKR(t *testing.T, err error, class pluginproto.Class, ckr uint) {
	t.Helper()
	wantClass(t, err, class)
	if got := pluginproto.CKROf(err); err != nil && got != ckr {
		t.Errorf("error %q carries %s, want %s", err, pluginproto.CKRName(got), pluginproto.CKRName(ckr))
	}
}

// wantAbsent says that a driver, having looked, does not have a key.
func wantAbsent(t *testing.T, d pluginproto.Driver, id pluginproto.KeyID) {
	t.Helper()
	_, err := d.Inspect(limit(t), id)
	wantClass(t, err, pluginproto.ClassNotFound)
	if _, ok := listed(t, d, id); ok {
		t.Errorf("key %s is listed", id)
	}
}

func listed(t *testing.T, d pluginproto.Driver, id pluginproto.KeyID) (pluginproto.Object, bool) {
	t.Helper()
	objects, err := d.List(limit(t))
	if err != nil {
		t.Fatalf("listing the keys: %v", err)
	}
	for _, o := range objects {
		if o.ID == id {
			return o, true
		}
	}
	return pluginproto.Object{}, false
}

func sameObject(t *testing.T, what string, got, want pluginproto.Object) {
	t.Helper()
	if got.ID != want.ID || got.Type != want.Type || got.Label != want.Label ||
		!bytes.Equal(got.CheckValue, want.CheckValue) || !bytes.Equal(got.Public, want.Public) {
		t.Errorf("%s: %+v, want %+v", what, got, want)
	}
}
