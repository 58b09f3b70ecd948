package httpapi_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/internal/leaktest"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
	"kmsd/kms/client"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// patience is for what comes sooner or later.
const patience = time.Minute

// The callers that the tests know: one may do everything, one nothing, and one works
// with the keys of the shop.
const (
	adminToken  = "token-of-admin"
	nobodyToken = "token-of-nobody"
	shopToken   = "token-of-shop"
	groupToken  = "token-of-group"
)

// caller is a name and what it may do.
type caller struct {
	name string
	may  func(action, key string) bool
}

func (c caller) Name() string                { return c.name }
func (c caller) May(action, key string) bool { return c.may(action, key) }

// tokens authenticates the callers of the tests, client certificates by their common
// name, and users at the other end of a unix socket.
type tokens struct{}

func (tokens) Authenticate(_ context.Context, cr httpapi.Credentials) (httpapi.Caller, error) {
	all := func(string, string) bool { return true }
	switch {
	case cr.Token == adminToken:
		return caller{"admin", all}, nil
	case cr.Token == nobodyToken:
		return caller{"nobody", func(string, string) bool { return false }}, nil
	case cr.Token == shopToken:
		return caller{"shop", func(_, key string) bool { return len(key) >= 5 && key[:5] == "shop-" }}, nil
	case cr.Token == groupToken:
		return caller{"group", func(action, _ string) bool { return action == "group-read" }}, nil
	case cr.Certificate != nil:
		return caller{"cert:" + cr.Certificate.Subject.CommonName, all}, nil
	case cr.PeerUID >= 0:
		return caller{"local", all}, nil
	}
	return nil, errors.New("no valid token or client certificate")
}

// auditLog keeps the records, and can fail.
type auditLog struct {
	mu      sync.Mutex // guards the rest
	records []httpapi.Record
	broken  bool
}

func (a *auditLog) Record(_ context.Context, r httpapi.Record) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.broken {
		return errors.New("no space left on device")
	}
	a.records = append(a.records, r)
	return nil
}

func (a *auditLog) take() []httpapi.Record {
	a.mu.Lock()
	defer a.mu.Unlock()
	records := a.records
	a.records = nil
	return records
}

func (a *auditLog) setBroken(b bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.broken = b
}

// authority signs the certificates of the tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	a := &authority{pool: x509.NewCertPool()}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	pair := a.sign(t, template)
	a.cert, a.key = pair.Leaf, pair.PrivateKey.(*ecdsa.PrivateKey)
	a.pool.AddCert(a.cert)
	return a
}

func (a *authority) issue(t testing.TB, name string) tls.Certificate {
	return a.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
}

// sign signs template with the authority, or with itself when there is none yet.
func (a *authority) sign(t testing.TB, template *x509.Certificate) tls.Certificate {
	t.Helper()
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// kmsd is a server of the API on a port of this machine.
type kmsd struct {
	addr    string
	ca      *authority
	audit   *auditLog
	service *apitest.Memory
	server  *http.Server
	http    *http.Client
}

// start serves a Memory until the test ends. change may alter the configuration.
func start(t testing.TB, service *apitest.Memory, change func(*httpapi.Config)) *kmsd {
	t.Helper()
	k := &kmsd{ca: newAuthority(t), audit: new(auditLog), service: service}
	cfg := httpapi.Config{Service: service, Auth: tokens{}, Audit: k.audit}
	if change != nil {
		change(&cfg)
	}
	h, err := httpapi.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	k.server = httpapi.Server(h, &tls.Config{
		Certificates: []tls.Certificate{k.ca.issue(t, "kmsd")},
		ClientCAs:    k.ca.pool,
		ClientAuth:   tls.VerifyClientCertIfGiven,
	}, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	k.addr = "https://" + l.Addr().String()
	served := make(chan error, 1)
	go func() { served <- k.server.ServeTLS(l, "", "") }()
	k.http = &http.Client{
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{RootCAs: k.ca.pool}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	t.Cleanup(func() {
		k.http.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := k.server.Shutdown(ctx); err != nil {
			t.Errorf("shutting down: %v", err)
		}
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("serving: %v", err)
		}
	})
	return k
}

// client returns one that is the admin.
func (k *kmsd) client(t testing.TB, change func(*client.Options)) *client.Client {
	t.Helper()
	opts := client.Options{RootCAs: k.ca.pool, Token: adminToken}
	if change != nil {
		change(&opts)
	}
	c, err := client.New(k.addr, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("closing the client: %v", err)
		}
	})
	return c
}

// answer is what came back.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// ask sends one request with a token ("" for none) and a body ("" for none), and
// headers as name, value, name, value.
func (k *kmsd) ask(t testing.TB, method, path, token, body string, headers ...string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, k.addr+path, bytes.NewReader([]byte(body)))
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for pair := range slices.Chunk(headers, 2) {
		req.Header.Set(pair[0], pair[1])
	}
	resp, err := k.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, b}
}

// error returns the error of an answer, with all that every error has.
func (a answer) error(t testing.TB) api.Error {
	t.Helper()
	var body api.ErrorBody
	dec := json.NewDecoder(bytes.NewReader(a.body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&body); err != nil || body.Error == nil {
		t.Fatalf("the answer is no error: %d %s", a.status, a.body)
	}
	if body.Error.Message == "" || body.Error.RequestID == "" || body.Error.RequestID != a.header.Get(api.RequestIDHeader) {
		t.Errorf("the error is without message or request id: %s", a.body)
	}
	return *body.Error
}

// wants fails the test unless the answer is an error of that status and code.
func (a answer) wants(t testing.TB, status int, code api.Code) api.Error {
	t.Helper()
	e := a.error(t)
	if a.status != status || e.Code != code {
		t.Errorf("got %d %s, want %d %s: %s", a.status, e.Code, status, code, a.body)
	}
	return e
}
