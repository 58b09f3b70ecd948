package httpapi_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/cmd/kmsd/internal/pipetest"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
	"kmsd/kms/client"
)

// The client over TLS keeps the promises of the service behind it.
func TestServiceOverTLS(t *testing.T) {
	apitest.Run(t, apitest.Plainly, func(t *testing.T) api.Service {
		return start(t, new(apitest.Memory), nil).client(t, nil)
	})
}

// The same for what an operator does.
func TestOperatedOverTLS(t *testing.T) {
	apitest.RunAdmin(t, apitest.Plainly, func(t *testing.T) (apitest.Operated, func(string) api.MemberSpec) {
		return start(t, new(apitest.Memory), nil).client(t, nil), apitest.MemorySpare
	})
}

// A certificate is as good as a token.
func TestClientCertificate(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	c := k.client(t, func(o *client.Options) {
		o.Token = ""
		o.Certificates = append(o.Certificates, k.ca.issue(t, "db1"))
	})
	if _, err := c.CreateMasterKey(t.Context(), "shop", api.KeyOptions{}); err != nil {
		t.Fatal(err)
	}
	if r := k.audit.take(); len(r) != 1 || r[0].Principal != "cert:db1" {
		t.Errorf("audited %+v", r)
	}
}

// A unix socket tells who is at its other end.
func TestUnixSocket(t *testing.T) {
	audit := new(auditLog)
	h, err := httpapi.New(httpapi.Config{Service: new(apitest.Memory), Auth: tokens{}, Audit: audit})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "kmsd.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := httpapi.Server(h, nil, nil)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	defer func() {
		_ = s.Shutdown(context.Background())
		if err := <-served; err != http.ErrServerClosed {
			t.Errorf("serving: %v", err)
		}
	}()
	c, err := client.New("unix://"+path, client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.CreateMasterKey(t.Context(), "shop", api.KeyOptions{}); err != nil {
		t.Fatal(err)
	}
	if r := audit.take(); len(r) != 1 || r[0].Principal != "local" || r[0].Remote[:5] != "unix:" {
		t.Errorf("audited %+v", r)
	}
}

// Recover reaches the service, and only for members that exist.
func TestRecover(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	c := k.client(t, nil)
	if err := c.Recover(t.Context(), apitest.MemoryGroup, apitest.MemoryMember); err != nil {
		t.Error(err)
	}
	if r := k.audit.take(); len(r) != 1 || r[0].Group != apitest.MemoryGroup || r[0].Member != apitest.MemoryMember {
		t.Errorf("audited %+v", r)
	}
	k.ask(t, "POST", "/v1/groups/default/members/hsm-z/recover", adminToken, "").wants(t, 404, api.CodeNotFound)
	k.ask(t, "POST", "/v1/groups/none/members/hsm-a/recover", adminToken, "").wants(t, 404, api.CodeNotFound)
}

func TestReady(t *testing.T) {
	service := new(apitest.Memory)
	k := start(t, service, nil)
	c := k.client(t, func(o *client.Options) { o.Token = "" })
	r, err := c.Ready(t.Context())
	if err != nil || !r.Ready || len(r.Members) != 1 || r.Members[0].Member != apitest.MemoryMember {
		t.Errorf("ready: %+v, %v", r, err)
	}
	unready := start(t, &apitest.Memory{Unready: true}, nil)
	r, err = unready.client(t, nil).Ready(t.Context())
	if err != nil || r.Ready || len(r.Members) != 1 {
		t.Errorf("not ready: %+v, %v", r, err)
	}
	if a := unready.ask(t, "GET", "/readyz", "", ""); a.status != 503 {
		t.Errorf("GET /readyz: %d %s", a.status, a.body)
	}
	if a := k.ask(t, "GET", "/livez", "", ""); a.status != 200 {
		t.Errorf("GET /livez: %d %s", a.status, a.body)
	}
}

// One principal cannot take every event stream from the others.
func TestStreamsAreLimitedForEachPrincipal(t *testing.T) {
	service := new(apitest.Memory)
	k := start(t, service, func(c *httpapi.Config) { c.Limits.Streams, c.Limits.StreamsEach = 2, 1 })
	watch(t, k, adminToken)
	e := k.ask(t, "GET", "/v1/events", adminToken, "").wants(t, 429, api.CodeRateLimited)
	if e.RetryAfterMS == 0 || !strings.Contains(e.Message, "principal admin") {
		t.Errorf("%+v", e)
	}
	watch(t, k, groupToken)
}

// A stream ends when its principal may not watch any more.
func TestAStreamEndsWithThePermission(t *testing.T) {
	var revoked atomic.Bool
	k := start(t, new(apitest.Memory), func(c *httpapi.Config) {
		c.Heartbeat = time.Millisecond
		c.Auth = oneCaller{caller{"watcher", func(string, string) bool { return !revoked.Load() }}}
	})
	body := watch(t, k, "any")
	revoked.Store(true)
	if _, err := io.Copy(io.Discard, body); err != nil { // to its end
		t.Errorf("reading the stream: %v", err)
	}
}

// oneCaller is everybody.
type oneCaller struct{ caller }

func (o oneCaller) Authenticate(context.Context, httpapi.Credentials) (httpapi.Caller, error) {
	return o.caller, nil
}

// watch opens a stream of events until the test ends, and returns when it is open.
func watch(t *testing.T, k *kmsd, token string) io.Reader {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.addr+"/v1/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := k.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("opening a stream: %s", resp.Status)
	}
	return resp.Body
}

// Event streams end when the server shuts down, long before their clients would.
func TestShutdownEndsEvents(t *testing.T) {
	service := new(apitest.Memory)
	k := start(t, service, func(c *httpapi.Config) { c.Heartbeat = 10 * time.Millisecond })
	c := k.client(t, func(o *client.Options) { o.Attempts = 1 })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	seen, ended := make(chan api.Event, 100), make(chan struct{})
	go func() {
		defer close(ended)
		for e := range c.Events(ctx) {
			seen <- e
		}
	}()
	for service.Readers() == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := c.Recover(t.Context(), apitest.MemoryGroup, apitest.MemoryMember); err != nil {
		t.Fatal(err)
	}
	if e := <-seen; e.Member != apitest.MemoryMember {
		t.Errorf("event %+v", e)
	}
	shut, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	if err := k.server.Shutdown(shut); err != nil {
		t.Errorf("shutting down with an open event stream: %v", err)
	}
	if e := <-seen; e.Type != api.EventDropped {
		t.Errorf("the client reads %+v, want to hear that it misses something", e)
	}
	cancel()
	<-ended
	if n := service.Readers(); n != 0 {
		t.Errorf("%d readers of events are left", n)
	}
}

// Who closes the audit log after Wait loses nothing of what was done.
func TestWaitIsForRequestsThatWereBrokenOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun, log := make(chan struct{}), new(auditLog)
		service := &apitest.Memory{Fail: func(ctx context.Context, _, _ string) error {
			close(begun)
			<-ctx.Done()
			<-time.After(time.Second) // an HSM that is told to stop
			return nil
		}}
		h, err := httpapi.New(httpapi.Config{Service: service, Auth: tokens{}, Audit: log})
		if err != nil {
			t.Fatal(err)
		}
		l, server := pipetest.Listen(), httpapi.Server(h, nil, nil)
		served := make(chan error, 1)
		go func() { served <- server.Serve(l) }()
		conn, err := l.Dial(t.Context(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, "POST /v1/keys/shop/rotate HTTP/1.1\r\nHost: kmsd\r\nAuthorization: Bearer "+adminToken+"\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		<-begun
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		<-served
		if r := log.take(); len(r) != 0 {
			t.Errorf("recorded %+v, while the request is under way", r)
		}
		if !h.Wait(t.Context()) {
			t.Error("a request is left")
		}
		if r := log.take(); len(r) != 1 || r[0].Action != "rotate" {
			t.Errorf("recorded %+v", r)
		}
	})
}
