// Package vaultkv answers: what did they ask, as a client of Vault's key-value store says it?
//
// A mount is a database whose data keys are kept here, and looks to its client like a
// secrets engine of type kv, version 2. What is served of that is what databases ask for:
//
//	GET         /v1/sys/mounts/MOUNT[/tune]         MariaDB, pg_tde
//	GET         /v1/MOUNT/config                    Percona Server for MySQL and for MongoDB
//	GET         /v1/MOUNT/data/KEY[?version=N]      all of them
//	POST, PUT   /v1/MOUNT/data/KEY                  {"options":{"cas":N},"data":{...}}
//	DELETE      /v1/MOUNT/data/KEY                  marks the newest version as deleted
//	GET         /v1/MOUNT/metadata/KEY
//	GET, LIST   /v1/MOUNT/metadata/[FOLDER]?list=true
//	POST, PUT   /v1/MOUNT/rotate/KEY                an HSM makes the next version; not in Vault
//
// X-Vault-Token has a token of kmsd's, whose policies allow named-get, named-put,
// named-list or named-delete on the database; any of these lets it see the mount. The
// mount is what the configuration calls it, with the text of X-Vault-Namespace and a
// slash before it if there is such a header. KEY is opaque: its bytes are those of the
// path, percent-decoded once, and neither cleaned nor redirected.
//
// An answer is always certain. 404 says that it is known that there is no such thing,
// 403 that somebody has decided so, 400 that the request can never succeed. Whatever
// is a fault of kmsd or of its HSMs has no answer at all: the connection is closed. So
// is it when a key is read whose mount has no database: the catalog may be the wrong one.
// MariaDB goes on with the keys that it has in memory when a connection fails, but
// not after a status of 5xx or 429, and a database that is told "not found" makes a new
// key and loses what the old one has encrypted.
package vaultkv

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/cmd/kmsd/internal/audit"
	"kmsd/kms/api"
)

const (
	// maxInFlight is how many requests are served at once, by default.
	maxInFlight = 1024
	// requestTime is what a request may take, by default: pg_tde waits 10 s in all.
	requestTime = 8 * time.Second
)

// Keys is what a mount shows, of api.Databases.
type Keys interface {
	PutNamedKey(ctx context.Context, database, id string, put api.NamedKeyPut) (api.NamedKey, error)
	RotateNamedKey(ctx context.Context, database, id string) (api.NamedKey, error)
	NamedKey(ctx context.Context, database, id string, version int) (api.NamedKey, error)
	DescribeNamedKey(ctx context.Context, database, id string) (api.NamedKey, error)
	NamedKeys(ctx context.Context, database string, opts api.ListOptions) (api.NamedKeyPage, error)
	DeleteNamedKey(ctx context.Context, database, id string) error
}

// Authenticator says whose token it is.
type Authenticator interface {
	// Authenticate returns the caller, or an error that is logged: the client learns no
	// more than that it may not.
	Authenticate(ctx context.Context, token string) (Caller, error)
}

// Caller is an authenticated principal. It is used for one request.
type Caller interface {
	Name() string
	// May says whether a policy allows the action on the database.
	May(action, database string) bool
}

// Auditor remembers who did what. A request whose record cannot be written is not
// answered.
type Auditor interface {
	Write(r audit.Record) error
}

// Mount is what is behind a mount.
type Mount struct {
	Database string
	Format   string // as in api.Database
}

// Config is what New needs. It is copied.
type Config struct {
	Keys   Keys
	Auth   Authenticator
	Audit  Auditor
	Mounts map[string]Mount // :: name, such as "mariadb" or "team/db1" → what is behind it; see SetMounts
	Logger hclog.Logger     // nil means silence

	// Observe is told of every request that gets a slot or is turned away for want of one:
	// its action, "ok" or the code of its error, and its time. It has to be quick. Nil:
	// nobody counts.
	Observe func(action, outcome string, took time.Duration)

	InFlight int           // requests being served at once, a quarter of them for one principal; zero means 1024
	Timeout  time.Duration // of a request; zero means 8 s
}

// Handler serves the mounts. It may be used by several servers at once.
type Handler struct {
	cfg       Config
	mounts    atomic.Pointer[mounts]
	slots     chan struct{} // one token for each request in flight
	shares    shares
	strangers *audit.Strangers
}

// New returns the handler of all mounts.
func New(cfg Config) (*Handler, error) {
	if cfg.Keys == nil || cfg.Auth == nil || cfg.Audit == nil {
		return nil, errors.New("making the Vault API: it needs keys, an authenticator and an auditor")
	}
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	if cfg.Observe == nil {
		cfg.Observe = func(string, string, time.Duration) {}
	}
	if cfg.InFlight == 0 {
		cfg.InFlight = maxInFlight
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = requestTime
	}
	h := &Handler{cfg: cfg, slots: make(chan struct{}, cfg.InFlight)}
	h.shares = shares{most: max(1, cfg.InFlight/4), taken: make(map[string]int)}
	h.strangers = audit.NewStrangers(0, func(since time.Time, n int) error {
		return h.record(audit.Record{Time: since, Outcome: string(api.CodeUnauthenticated), Suppressed: n, Duration: time.Since(since)})
	})
	h.SetMounts(cfg.Mounts)
	return h, nil
}

// SetMounts exchanges the mounts. Requests under way go on with those they began with.
// A mount that is taken away gives no answers any more, until a restart: a database that
// still asks there goes on with the keys that it has in memory, and is not told that
// they do not exist. It is to be called by one goroutine at a time.
func (h *Handler) SetMounts(shown map[string]Mount) {
	next := mounts{shown: maps.Clone(shown), gone: map[string]Mount{}}
	if old := h.mounts.Load(); old != nil {
		maps.Copy(next.gone, old.gone)
		maps.Copy(next.gone, old.shown)
	}
	maps.DeleteFunc(next.gone, func(name string, _ Mount) bool { return next.has(name) })
	for name := range next.gone {
		h.cfg.Logger.Warn("a mount is taken away: databases that still ask there get no answer", "mount", name)
	}
	h.mounts.Store(&next)
}

// Wait lets no more requests in, and waits for those under way until ctx ends: whoever is
// broken off with its connection comes to an end too, and has that written down. It
// reports whether none is left, and is called once.
func (h *Handler) Wait(ctx context.Context) bool {
	for range cap(h.slots) {
		select {
		case h.slots <- struct{}{}:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// Flush writes down what the audit log has not been told yet. Call it when no request
// is left.
func (h *Handler) Flush() { h.strangers.Flush() }

// ServeHTTP answers, or closes the connection without an answer.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case h.slots <- struct{}{}:
		defer func() { <-h.slots }()
	default:
		h.cfg.Observe(unrouted, string(api.CodeRateLimited), 0)
		h.cfg.Logger.Debug("too many requests of databases at once; a connection is closed", "most", h.cfg.InFlight)
		abort(r)
	}
	h.serve(w, r)
}

func (h *Handler) record(r audit.Record) error {
	err := h.cfg.Audit.Write(r)
	if err != nil {
		h.cfg.Logger.Error("the audit log cannot be written", "request_id", r.RequestID, "error", err)
	}
	return err
}

// abort ends the connection of a request without an answer: every client takes that
// for a server that is away.
func abort(r *http.Request) {
	if conn, ok := r.Context().Value(connection{}).(net.Conn); ok {
		_ = under(conn).Close() // of HTTP/2 the other requests too: they would fare the same
	}
	panic(http.ErrAbortHandler) // net/http knows it and logs nothing
}

// buffers hold bodies. They are wiped when they are given back.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

func giveBack(b *bytes.Buffer) {
	clear(b.Bytes())
	b.Reset()
	const keep = 256 << 10 // bytes; the buffer of a huge list is not kept for keys
	if b.Cap() <= keep {
		buffers.Put(b)
	}
}

// answer writes a whole answer. A client that is gone is not worth a line.
func answer(w http.ResponseWriter, status int, body []byte) {
	head := w.Header()
	head.Set("Cache-Control", "no-store")
	if status == http.StatusNoContent {
		w.WriteHeader(status)
		return
	}
	head.Set("Content-Type", "application/json")
	head.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

// newID is a random UUID, version 4, as Vault names its requests.
func newID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails, see crypto/rand
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
