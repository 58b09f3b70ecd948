package vaultkv_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kmsd/cmd/kmsd/internal/audit"
	"kmsd/cmd/kmsd/internal/pipetest"
	"kmsd/cmd/kmsd/internal/vaultkv"
	"kmsd/internal/leaktest"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// principals are the tokens that are known, and what each may do. :: token → actions
type principals map[string][]string

func (p principals) Authenticate(_ context.Context, token string) (vaultkv.Caller, error) {
	actions, ok := p[token]
	if !ok {
		return nil, errors.New("the token is not known")
	}
	return caller{token, actions}, nil
}

type caller struct {
	name    string
	actions []string
}

func (c caller) Name() string { return c.name }

func (c caller) May(action, database string) bool {
	for _, a := range c.actions {
		if a == action && database != "closed" {
			return true
		}
	}
	return false
}

// trail keeps the records of the audit log.
type trail struct {
	mu      sync.Mutex // guards the rest
	records []audit.Record
	fail    error
}

func (l *trail) Write(r audit.Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return l.fail
	}
	l.records = append(l.records, r)
	return nil
}

func (l *trail) last() audit.Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.records) == 0 {
		return audit.Record{}
	}
	return l.records[len(l.records)-1]
}

func (l *trail) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.records)
}

// faults make the calls of a service fail while it is used. The zero value makes none.
type faults struct {
	f atomic.Pointer[func(context.Context) error]
}

// set has every call ask f; nil: none.
func (f *faults) set(fail func(context.Context) error) { f.f.Store(&fail) }

func (f *faults) ask(ctx context.Context, _, _ string) error {
	if fail := f.f.Load(); fail != nil && *fail != nil {
		return (*fail)(ctx)
	}
	return nil
}

// site is a server with what stands behind it.
type site struct {
	keys   *apitest.Memory
	faults faults
	trail  *trail
	server *vaultkv.Server
	addr   string
	reach  func() (net.Conn, error)
	end    func()
}

const (
	token    = "kmsd_database"
	listener = "kmsd_listener"
)

func config(keys *apitest.Memory, log *trail) vaultkv.Config {
	return vaultkv.Config{
		Keys: keys, Audit: log,
		Auth: principals{
			token:    {"named-get", "named-put", "named-list", "named-delete"},
			listener: {"named-list"},
		},
		Mounts: map[string]vaultkv.Mount{
			"mariadb":  {Database: "shop", Format: api.FormatMariaDB},
			"plain":    {Database: "shop"}, // the same without its format
			"team/db1": {Database: "erp"},
			"later":    {Database: "later"}, // nobody has made it yet
			"closed":   {Database: "closed"},
		},
	}
}

func newMemory(t testing.TB) *apitest.Memory {
	t.Helper()
	m := &apitest.Memory{Formats: map[string]string{}}
	for _, name := range []string{"shop", "erp", "closed"} {
		if _, err := m.CreateDatabase(t.Context(), name, api.DatabaseOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// start serves until the test ends. change may alter the configuration.
func start(t *testing.T, change func(*vaultkv.Config)) *site {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	s := startOn(t, l, change)
	s.addr, s.reach = addr, func() (net.Conn, error) { return net.Dial("tcp", addr) }
	return s
}

// startInBubble serves in a bubble until its test ends.
func startInBubble(t *testing.T) *site {
	t.Helper()
	l := pipetest.Listen()
	s := startOn(t, l, nil)
	s.reach = func() (net.Conn, error) { return l.Dial(t.Context(), "", "") }
	return s
}

func startOn(t *testing.T, l net.Listener, change func(*vaultkv.Config)) *site {
	t.Helper()
	s := &site{keys: newMemory(t), trail: &trail{}}
	s.keys.Fail = s.faults.ask
	cfg := config(s.keys, s.trail)
	if change != nil {
		change(&cfg)
	}
	h, err := vaultkv.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s.server = vaultkv.NewServer(h, &tls.Config{Certificates: []tls.Certificate{certificate(t)}, NextProtos: []string{"h2", "http/1.1"}}, nil)
	served := make(chan error, 1)
	go func() { served <- s.server.Serve(l) }()
	s.end = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := errors.Join(s.server.End(ctx), <-served); err != nil {
			t.Errorf("ending the server: %v", err)
		}
		h.Flush()
	})
	t.Cleanup(s.end)
	return s
}

func certificate(t *testing.T) tls.Certificate {
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
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// dial opens a connection that speaks HTTP/1.1, as pg_tde and Percona do.
func (s *site) dial(t *testing.T) *conn {
	t.Helper()
	below, err := s.reach()
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(below, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
	t.Cleanup(func() { c.Close() })
	if err := c.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	return &conn{c, bufio.NewReader(c)}
}

type conn struct {
	net.Conn
	r *bufio.Reader
}

// send writes a request as it is, but for the ends of lines.
func (c *conn) send(t *testing.T, request string) {
	t.Helper()
	if _, err := io.WriteString(c, wire(request)); err != nil {
		t.Fatal(err)
	}
}

// receive reads an answer, or how there is none.
func (c *conn) receive() (status int, body []byte, err error) {
	res, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	body, err = io.ReadAll(res.Body)
	return res.StatusCode, body, err
}

// wire turns a request, as it stands in a file, into bytes: the header's lines end in
// CRLF, and Content-Length is found out if there is a body.
func wire(request string) string {
	head, body, _ := bytes.Cut([]byte(request), []byte("\n\n"))
	head = bytes.ReplaceAll(bytes.TrimRight(head, "\n"), []byte("\n"), []byte("\r\n"))
	body = bytes.TrimRight(body, "\n")
	if len(body) > 0 {
		head = append(head, "\r\nContent-Length: "...)
		head = append(head, big.NewInt(int64(len(body))).String()...)
	}
	return string(head) + "\r\n\r\n" + string(body)
}

// ask sends one request over a connection of its own.
func (s *site) ask(t *testing.T, request string) (status int, body string, err error) {
	t.Helper()
	c := s.dial(t)
	defer c.Close()
	c.send(t, request)
	status, b, err := c.receive()
	return status, string(b), err
}

// put stores a value.
func (s *site) put(t *testing.T, database, id string, put api.NamedKeyPut) {
	t.Helper()
	if _, err := s.keys.PutNamedKey(t.Context(), database, id, put); err != nil {
		t.Fatal(err)
	}
}
