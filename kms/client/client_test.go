package client_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kmsd/internal/leaktest"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

// ownTime is what a call has whose context has no deadline, unless the client is told
// otherwise. A call that ends before half of it did not wait for its end.
const ownTime = 30 * time.Second

func TestMain(m *testing.M) { leaktest.Main(m) }

// serve answers with f until the test ends, and returns a client of it.
func serve(t testing.TB, change func(*client.Options), f http.HandlerFunc) (*client.Client, *httptest.Server) {
	t.Helper()
	s := httptest.NewUnstartedServer(f)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // handshakes that fail on purpose
	s.StartTLS()
	opts := client.Options{RootCAs: x509.NewCertPool(), Token: "the-token"}
	opts.RootCAs.AddCert(s.Certificate())
	if change != nil {
		change(&opts)
	}
	c, err := client.New(s.URL, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		s.Close()
	})
	return c, s
}

// fail answers with an error as kmsd does.
func fail(w http.ResponseWriter, status int, code api.Code, retryable bool) {
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"error":{"code":%q,"message":"as kmsd says it","retryable":%t,"retry_after_ms":1}}`, code, retryable)
}

func TestAddress(t *testing.T) {
	for addr, fault := range map[string]string{
		"https://kms.example":           "",
		"https://kms.example:1/":        "",
		"https://[::1]:8420":            "",
		"unix:///run/kmsd.sock":         "",
		"http://kms.example":            `the address of kmsd is "http://kms.example", want https://HOST[:PORT] or unix:///PATH`,
		"kms.example":                   `the address of kmsd is "kms.example", want https://HOST[:PORT] or unix:///PATH`,
		"":                              `the address of kmsd is "", want https://HOST[:PORT] or unix:///PATH`,
		"https://":                      `the address of kmsd is "https:", want https://HOST[:PORT] or unix:///PATH`,
		"https://kms.example/v1":        `the address of kmsd is "https://kms.example/v1", want https://HOST[:PORT] or unix:///PATH`,
		"https://admin:pw@kms.example":  `the address of kmsd is "https://admin:xxxxx@kms.example", want https://HOST[:PORT] or unix:///PATH`,
		"unix://kmsd.sock":              `the address of kmsd is "unix://kmsd.sock", want https://HOST[:PORT] or unix:///PATH`,
		"unix://":                       `the address of kmsd is "unix:", want https://HOST[:PORT] or unix:///PATH`,
		"https://kms.example:notaport/": `the address of kmsd is "https://kms.example:notaport/", want https://HOST[:PORT] or unix:///PATH`,
		"127.0.0.1:8420":                `the address of kmsd is "127.0.0.1:8420", want https://HOST[:PORT] or unix:///PATH`,
		"https://admin:pw@kms:x":        `the address of kmsd is "...@kms:x", want https://HOST[:PORT] or unix:///PATH`,
	} {
		_, err := client.New(addr, client.Options{})
		if got := fmt.Sprint(err); (err == nil) != (fault == "") || err != nil && got != fault {
			t.Errorf("New(%q): %v, want %s", addr, err, fault)
		}
	}
}

// What may pass is tried again if doing it twice does no harm.
func TestRetries(t *testing.T) {
	wrap := func(c *client.Client) error {
		_, err := c.Wrap(context.Background(), "shop", []byte("p"), nil)
		return err
	}
	create := func(c *client.Client) error {
		_, err := c.CreateMasterKey(context.Background(), "shop", api.KeyOptions{})
		return err
	}
	for _, c := range []struct {
		name     string
		call     func(*client.Client) error
		status   int
		code     api.Code
		retry    bool
		attempts int32
	}{
		{"wrapping while the group is lost is tried again", wrap, 503, api.CodeGroupLost, true, 4},
		{"wrapping while it is unavailable is tried again", wrap, 503, api.CodeUnavailable, true, 4},
		{"wrapping after its deadline is not", wrap, 504, api.CodeDeadline, true, 1},
		{"wrapping with a wrong key is not", wrap, 422, api.CodeWrongKey, false, 1},
		{"creating while it is unavailable is not: it may have been done", create, 503, api.CodeUnavailable, true, 1},
		{"creating with too few copies is not", create, 503, api.CodeInsufficientCopies, true, 1},
		{"creating at the limit is: it was refused at the door", create, 429, api.CodeRateLimited, true, 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			var asked atomic.Int32
			cl, _ := serve(t, nil, func(w http.ResponseWriter, _ *http.Request) {
				asked.Add(1)
				fail(w, c.status, c.code, c.retry)
			})
			err := c.call(cl)
			var e *api.Error
			if !errors.As(err, &e) || e.Code != c.code || e.Message != "as kmsd says it" {
				t.Errorf("got %v", err)
			}
			if n := asked.Load(); n != c.attempts {
				t.Errorf("asked %d times, want %d", n, c.attempts)
			}
		})
	}
}

func TestRetrySucceeds(t *testing.T) {
	var asked atomic.Int32
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		switch asked.Add(1) {
		case 1:
			fail(w, 503, api.CodeUnavailable, true)
		case 2:
			hangUp(t, w)
		default:
			b, err := io.ReadAll(r.Body)
			if err != nil || string(b) != `{"plaintext":"cA=="}` {
				t.Errorf("the third request has the body %q, %v", b, err)
			}
			io.WriteString(w, `{"wrapped":"dw==","version":1}`)
		}
	})
	wrapped, err := c.Wrap(t.Context(), "shop", []byte("p"), nil)
	if err != nil || string(wrapped) != "w" {
		t.Errorf("%q, %v", wrapped, err)
	}
}

// hangUp closes the connection without an answer.
func hangUp(t testing.TB, w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	conn.Close()
}

// When the answer to a change is lost, the user hears that it may have been made.
func TestLostAnswerOfAChange(t *testing.T) {
	var asked atomic.Int32
	c, _ := serve(t, nil, func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		hangUp(t, w)
	})
	_, err := c.Rotate(t.Context(), "shop")
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeUnavailable || !strings.Contains(e.Hint, "look before you try again") || asked.Load() != 1 {
		t.Errorf("%#v after %d requests", err, asked.Load())
	}
}

// A server that is not there has certainly done nothing, so that all is tried again.
func TestNobodyListens(t *testing.T) {
	_, at := bound(t)
	addr := "https://" + at
	c, err := client.New(addr, client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	start := time.Now()
	_, err = c.CreateMasterKey(t.Context(), "shop", api.KeyOptions{})
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeUnavailable || !e.Retryable ||
		e.Message != "connecting to kmsd at "+addr+": connect: connection refused" || !strings.Contains(e.Hint, "is kmsd running") {
		t.Errorf("%#v", err)
	}
	if took := time.Since(start); took < 100*time.Millisecond || took > ownTime/2 {
		t.Errorf("it gave up after %v", took)
	}
	s := c.Status()
	if s.Error == "" || len(s.Groups) != 0 {
		t.Errorf("status %+v", s)
	}
}

func TestUntrustedServer(t *testing.T) {
	c, _ := serve(t, func(o *client.Options) { o.RootCAs = x509.NewCertPool() }, func(http.ResponseWriter, *http.Request) {
		t.Error("a server that is not trusted was sent a request")
	})
	_, err := c.Key(t.Context(), "shop")
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeUnavailable || e.Retryable || !strings.Contains(e.Hint, "KMSD_CACERT") {
		t.Errorf("%#v", err)
	}
}

func TestServerWhoseCertificateHasEnded(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(-time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(nil)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	s.StartTLS()
	defer s.Close()
	opts := client.Options{RootCAs: x509.NewCertPool()}
	opts.RootCAs.AddCert(s.Certificate())
	c, err := client.New(s.URL, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.Key(t.Context(), "shop")
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeUnavailable || e.Retryable || !strings.Contains(e.Hint, "renew the certificate of kmsd") {
		t.Errorf("%#v", err)
	}
}

// A token goes to the address that was given and nowhere else.
func TestRedirectIsNotFollowed(t *testing.T) {
	var asked atomic.Int32
	c, s := serve(t, nil, nil)
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		http.Redirect(w, r, s.URL+"/elsewhere", http.StatusFound)
	})
	_, err := c.Key(t.Context(), "shop")
	if err == nil || err.Error() != "the answer has HTTP status 302 and is not kmsd's" || asked.Load() != 1 {
		t.Errorf("%v after %d requests", err, asked.Load())
	}
}

// An answer that is not what was asked for is an error, never an empty success.
func TestAnswersAreChecked(t *testing.T) {
	calls := map[string]func(*client.Client) error{
		"wrap":    func(c *client.Client) error { _, err := c.Wrap(t.Context(), "k", []byte("p"), nil); return err },
		"unwrap":  func(c *client.Client) error { _, err := c.Unwrap(t.Context(), "k", []byte("w"), nil); return err },
		"rewrap":  func(c *client.Client) error { _, err := c.Rewrap(t.Context(), "k", []byte("w"), nil); return err },
		"datakey": func(c *client.Client) error { _, err := c.DataKey(t.Context(), "k", 32, nil); return err },
		"random":  func(c *client.Client) error { _, err := c.Random(t.Context(), "", 5); return err },
		"batch": func(c *client.Client) error {
			_, err := c.Batch(t.Context(), api.OpWrap, "k", make([]api.Item, 2))
			return err
		},
	}
	for _, body := range []string{
		`{}`, `null`, ``, `<html>`, `{"wrapped":5}`, `{"plaintext":""}`, `{"random":"AAAA"}`, `{"items":[{}]}`,
		`{"plaintext":"AAAA","wrapped":"","version":1}`,
	} {
		c, _ := serve(t, nil, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) })
		for name, call := range calls {
			if name == "unwrap" && strings.Contains(body, "AAAA") {
				continue // has a plaintext
			}
			if err := call(c); !errors.Is(err, api.ErrInternal) {
				t.Errorf("%s answered with %s: %v", name, body, err)
			}
		}
	}
}

func TestForeignAnswers(t *testing.T) {
	for status, want := range map[int]error{
		502: api.ErrUnavailable, 503: api.ErrUnavailable, 504: api.ErrUnavailable, 429: api.ErrRateLimited, 500: api.ErrInternal, 418: api.ErrInternal,
	} {
		c, _ := serve(t, func(o *client.Options) { o.Attempts = 1 }, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			io.WriteString(w, "<html>from a proxy</html>")
		})
		if _, err := c.Key(t.Context(), "shop"); !errors.Is(err, want) {
			t.Errorf("status %d became %v", status, err)
		}
	}
}

// An answer without end does not fill the memory.
func TestEndlessAnswer(t *testing.T) {
	chunk := make([]byte, 1<<20)
	c, _ := serve(t, func(o *client.Options) { o.Timeout = time.Hour }, func(w http.ResponseWriter, _ *http.Request) {
		for {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	_, err := c.Key(t.Context(), "shop")
	if !errors.Is(err, api.ErrInternal) || err.Error() != "the answer of kmsd is longer than 33554432 bytes" {
		t.Error(err)
	}
}

// The time of a call is that of its context, or the client's own, and the server
// is told.
func TestTheServerIsToldTheTime(t *testing.T) {
	told := make(chan string, 1)
	c, _ := serve(t, func(o *client.Options) { o.Timeout = time.Hour }, func(w http.ResponseWriter, r *http.Request) {
		told <- r.Header.Get(api.TimeoutHeader)
		io.WriteString(w, `{}`)
	})
	for _, tt := range []struct {
		name string
		ctx  context.Context
		time time.Duration
	}{
		{"the client's", t.Context(), time.Hour},
		{"the context's", within(t, 3*time.Hour), 3 * time.Hour},
		{"the context's, which is shorter", within(t, 30*time.Minute), 30 * time.Minute},
	} {
		if _, err := c.Key(tt.ctx, "shop"); err != nil {
			t.Fatal(err)
		}
		text := <-told
		if d, err := time.ParseDuration(text); err != nil || d > tt.time || d < tt.time-10*time.Minute {
			t.Errorf("%s: the server was told %s, want %v", tt.name, text, tt.time)
		}
	}
}

// A call ends with its time, wherever it has come by then.
func TestACallEndsWithItsTime(t *testing.T) {
	const short = 200 * time.Millisecond
	c, _ := serve(t, func(o *client.Options) { o.Timeout = short }, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/keys/first" { // opens the connection
			io.WriteString(w, `{}`)
			return
		}
		<-r.Context().Done()
	})
	if _, err := c.Key(within(t, ownTime), "first"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"the client's", "the context's"} {
		ctx, start := t.Context(), time.Now()
		if name == "the context's" {
			ctx = within(t, short)
		}
		_, err := c.Key(ctx, "shop")
		if !errors.Is(err, api.ErrDeadline) || !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > ownTime/2 {
			t.Errorf("%s: %v after %v", name, err, time.Since(start))
		}
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// A pause that the time does not suffice for is not begun.
func TestRetryAfterTheDeadlineIsNotWaitedFor(t *testing.T) {
	c, _ := serve(t, nil, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(503)
		io.WriteString(w, `{"error":{"code":"group_lost","message":"lost","retryable":true,"retry_after_ms":60000}}`)
	})
	start := time.Now()
	_, err := c.Key(within(t, ownTime), "shop")
	if !errors.Is(err, api.ErrGroupLost) || time.Since(start) > ownTime/2 {
		t.Errorf("%v after %v", err, time.Since(start))
	}
}

func TestClose(t *testing.T) {
	entered := make(chan struct{}, 1)
	c, _ := serve(t, nil, func(_ http.ResponseWriter, r *http.Request) {
		entered <- struct{}{}
		<-r.Context().Done()
	})
	done := make(chan error, 1)
	go func() { _, err := c.Key(t.Context(), "shop"); done <- err }()
	<-entered
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	err := <-done
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeUnavailable || e.Retryable || !strings.HasSuffix(e.Message, "the client is closed") {
		t.Errorf("%#v", err)
	}
	for range c.Events(t.Context()) {
		t.Error("a closed client yields events")
	}
}

// Status falls back to what it knew.
func TestStatusFallsBack(t *testing.T) {
	var down atomic.Bool
	c, _ := serve(t, func(o *client.Options) { o.Attempts = 1 }, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/groups" {
			t.Errorf("asked for %s", r.URL.Path)
		}
		if down.Load() {
			fail(w, 503, api.CodeUnavailable, true)
			return
		}
		io.WriteString(w, `{"version":"1","groups":[{"name":"default","state":"normal"}]}`)
	})
	if s := c.Status(); s.Error != "" || len(s.Groups) != 1 {
		t.Errorf("%+v", s)
	}
	down.Store(true)
	if s := c.Status(); s.Error != "as kmsd says it" || len(s.Groups) != 1 || s.Groups[0].State != api.GroupNormal {
		t.Errorf("%+v", s)
	}
	down.Store(false)
	if s := c.Status(); s.Error != "" {
		t.Errorf("%+v", s)
	}
}

func TestSettings(t *testing.T) {
	dir := t.TempDir()
	c, s := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		if got := r.Header.Get("Authorization"); got != "Bearer from-env" {
			t.Errorf("Authorization is %q", got)
		}
		io.WriteString(w, `{"name":"shop"}`)
	})
	_ = c
	ca := filepath.Join(dir, "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(dir, "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KMSD_ADDR", s.URL)
	t.Setenv("KMSD_CACERT", ca)
	t.Setenv("KMSD_TOKEN", "from-env")
	e, err := client.FromEnv().New()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if k, err := e.Key(t.Context(), "shop"); err != nil || k.Name != "shop" {
		t.Errorf("%+v, %v", k, err)
	}
	for fault, settings := range map[string]client.Settings{
		"the address of kmsd is not given (--addr or KMSD_ADDR)":               {},
		"reading the CA certificate: open /nowhere: no such file or directory": {Addr: s.URL, CACert: "/nowhere"},
		"reading the CA certificate: " + empty + " holds no PEM certificate":   {Addr: s.URL, CACert: empty},
		"reading the client certificate and its key: open : no such file":      {Addr: s.URL, Cert: ca},
	} {
		if _, err := settings.New(); err == nil || !strings.HasPrefix(err.Error(), fault) {
			t.Errorf("got %v, want %s", err, fault)
		}
	}
}

func Example() {
	c, err := client.FromEnv().New()
	if err != nil {
		fmt.Println("no kmsd is configured")
		return
	}
	defer c.Close()
	ctx := context.Background()
	wrapped, err := c.Wrap(ctx, "shop", []byte("a data key of 32 bytes, or so...."), []byte("table orders"))
	if errors.Is(err, api.ErrNotFound) {
		_, err = c.CreateMasterKey(ctx, "shop", api.KeyOptions{})
	}
	fmt.Println(len(wrapped), err)
}

// Not even the first of the calls that come after it.
func TestNoCallBeginsAfterClose(t *testing.T) {
	c, _ := serve(t, nil, func(http.ResponseWriter, *http.Request) { t.Error("a closed client asks") })
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if _, err := c.Key(t.Context(), "shop"); err == nil || !strings.HasSuffix(err.Error(), "the client is closed") {
			t.Errorf("a call gets %v", err)
		}
		for range c.Events(t.Context()) {
			t.Error("a closed client yields events")
		}
	}
}
