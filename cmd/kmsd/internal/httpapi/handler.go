// Package httpapi answers: what did they ask, in HTTP?
//
// The API is one table of routes, in routes.go. A row says method and path, the
// action that a policy has to allow, how large a body may be, and a function that
// takes a decoded request and returns a value. That function never sees the
// request's header or the response: only the door (door.go) can answer, and it
// answers after it has authenticated, authorised and audited. So a route that
// forgets one of these cannot be written.
//
// Every answer is JSON. The status is 200, or that of the error's code (see
// errors.go); in the answer to a batch each failed item has its own error and the
// status is 200.
package httpapi

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/cmd/kmsd/internal/audit"
	"kmsd/kms/api"
)

// Service is what the routes call.
type Service interface {
	api.Service
	api.Admin
	api.Databases
	api.Backups
	// Ready says from memory whether keys can be used.
	Ready() api.Readiness
}

// Limits keep one client from taking everything. The zero value has sane ones.
type Limits struct {
	InFlight    int           // requests being served at once; zero means 4096
	Streams     int           // event streams at once; zero means 64
	StreamsEach int           // event streams of one principal; zero means a quarter of Streams
	Rate        float64       // requests per second of one principal; zero means no limit
	Burst       int           // requests that may come at once under Rate; zero means a second's worth
	Timeout     time.Duration // of a request; zero means 30 s
	// Strangers is how many requests that nobody is recognised in are answered and
	// written down at once; zero means 100. Then it is one a second, and the others are
	// refused and counted.
	Strangers int
}

// Config is what New needs. It is copied.
type Config struct {
	Service Service
	Auth    Authenticator
	Audit   Auditor
	Limits  Limits
	Logger  hclog.Logger // nil means silence

	// Observe is told of every request when its answer is certain: the action of its
	// route, "ok" or the code of its error, the items of its batch (0 when it was none)
	// and how many of them failed with which code, and its time. It is on the path of
	// every request, so it has to be quick. Nil: nobody counts.
	Observe func(action, outcome string, items int, failed map[api.Code]int, took time.Duration)
	// Metrics returns what /metrics shows, in the text format of Prometheus 0.0.4, from
	// memory. Nil: there is no such route.
	Metrics func() ([]byte, error)

	// Heartbeat is the pause between two signs of life on an idle event stream. Zero
	// means 15 s.
	Heartbeat time.Duration
}

// Handler serves the API. Close it before waiting for requests to end.
type Handler struct {
	cfg       Config
	paths     *tree
	document  []byte // the OpenAPI document
	origin    *http.CrossOriginProtection
	rates     *rates
	strangers *audit.Strangers
	slots     chan struct{} // one token for each request in flight
	streams   *streams

	closing context.Context // ended by Close, and with it what does not end by itself
	close   context.CancelFunc
}

// New returns the handler of the whole API.
func New(cfg Config) (*Handler, error) {
	if cfg.Service == nil || cfg.Auth == nil || cfg.Audit == nil {
		return nil, errors.New("making the HTTP API: it needs a service, an authenticator and an auditor")
	}
	if cfg.Logger == nil {
		cfg.Logger = hclog.NewNullLogger()
	}
	if cfg.Observe == nil {
		cfg.Observe = func(string, string, int, map[api.Code]int, time.Duration) {}
	}
	if cfg.Heartbeat == 0 {
		cfg.Heartbeat = 15 * time.Second
	}
	cfg.Limits = cfg.Limits.withDefaults()
	document, err := describe(routes(), publicRoutes())
	if err != nil {
		return nil, err
	}
	h := &Handler{
		cfg:       cfg,
		paths:     new(tree),
		document:  document,
		origin:    http.NewCrossOriginProtection(),
		strangers: newStrangers(cfg),
		rates:     newRates(cfg.Limits.Rate, cfg.Limits.Burst),
		slots:     make(chan struct{}, cfg.Limits.InFlight),
		streams:   newStreams(cfg.Limits.Streams, cfg.Limits.StreamsEach),
	}
	h.closing, h.close = context.WithCancel(context.Background())
	h.register()
	return h, nil
}

// newStrangers counts those who cannot prove who they are.
func newStrangers(cfg Config) *audit.Strangers {
	return audit.NewStrangers(cfg.Limits.Strangers, func(since time.Time, n int) error {
		r := Record{Time: since, Outcome: string(api.CodeUnauthenticated), Suppressed: n, Duration: time.Since(since)}
		err := cfg.Audit.Record(context.Background(), r)
		if err != nil {
			cfg.Logger.Error("the audit log cannot be written", "suppressed", n, "error", err)
		}
		return err
	})
}

// Close ends the event streams, and the work on members that may take long. Other
// requests end by themselves.
func (h *Handler) Close() { h.close() }

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

// methods are the handlers of one path.
type methods map[string]http.HandlerFunc

func (h *Handler) register() {
	paths := make(map[string]methods)
	add := func(method, pattern string, f http.HandlerFunc) {
		if paths[pattern] == nil {
			paths[pattern] = make(methods)
		}
		paths[pattern][method] = f
	}
	for _, rt := range routes() {
		add(rt.method, rt.pattern, func(w http.ResponseWriter, r *http.Request) { h.serve(rt, w, r) })
	}
	for _, rt := range publicRoutes() {
		add(http.MethodGet, rt.pattern, func(w http.ResponseWriter, r *http.Request) { h.servePublic(rt, w, r) })
	}
	for pattern, m := range paths {
		h.paths.add(pattern, func(w http.ResponseWriter, r *http.Request) { h.dispatch(m, w, r) })
	}
}

func errNoRoute() *api.Error {
	e := api.NewError(api.CodeNotFound, "no such route", nil)
	e.Hint = "GET /openapi.json lists the routes"
	return e
}

// dispatch calls the handler of the request's method. HEAD is GET without a body;
// net/http leaves that out.
func (h *Handler) dispatch(m methods, w http.ResponseWriter, r *http.Request) {
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	f, ok := m[method]
	if !ok {
		allowed := make([]string, 0, len(m))
		for name := range m {
			allowed = append(allowed, name)
		}
		slices.Sort(allowed)
		allow := strings.Join(allowed, ", ")
		w.Header().Set("Allow", allow)
		e := api.NewError(api.CodeBadRequest, "the path has no method "+clip(r.Method)+", only "+allow, nil)
		h.answerError(w, http.StatusMethodNotAllowed, e)
		return
	}
	f(w, r)
}

// ServeHTTP gives the request its id, holds it against the limits that need no
// name, and finds its route.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set(api.RequestIDHeader, requestID(r))
	if !opaque(r.URL) {
		h.refuse(w, badRequest("the path has bytes that must be percent-encoded"))
		return
	}
	select {
	case h.slots <- struct{}{}:
		defer func() { <-h.slots }()
	default:
		e := api.NewError(api.CodeRateLimited, "too many requests are being served", nil)
		e.RetryAfterMS = 100
		h.cfg.Observe(crowded, string(e.Code), 0, nil, 0)
		h.refuse(w, e)
		return
	}
	serve := h.paths.find(r)
	if serve == nil {
		h.refuse(w, errNoRoute())
		return
	}
	serve(w, r)
}

// requestID is the client's own when that is sane, else a random one.
func requestID(r *http.Request) string {
	if id := r.Header.Get(api.RequestIDHeader); saneID(id) {
		return id
	}
	var b [12]byte
	rand.Read(b[:]) // never fails, see crypto/rand
	return hex.EncodeToString(b[:])
}

func saneID(id string) bool {
	if id == "" || len(id) > 64 {
		return false
	}
	return strings.IndexFunc(id, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '.' && c != '_' && c != '-'
	}) < 0
}

// clip shortens foreign text that goes into a message.
func clip(s string) string {
	const most = 64
	if len(s) > most {
		s = s[:most] + "..."
	}
	return s
}
