package e2e_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"kmsd/internal/devserver"
	"kmsd/kms/api"
)

func TestBadEnvelopes(t *testing.T) {
	c := dial(t, start(t))
	createKey(t, c, "shop")
	createKey(t, c, "bank")
	plain, aad := random(32), []byte("table orders")
	good := wrap(t, c, "shop", plain, aad)

	unwrap := func(t *testing.T, key string, wrapped, aad []byte, want ...error) {
		t.Helper()
		got, err := c.Unwrap(t.Context(), key, wrapped, aad)
		if err == nil {
			t.Fatalf("it unwraps to %d bytes", len(got))
		}
		for _, w := range want {
			if errors.Is(err, w) {
				return
			}
		}
		t.Errorf("got %v (%s), want one of %v", err, api.AsError(err).Code, want)
	}
	t.Run("cut short anywhere", func(t *testing.T) {
		for n := 1; n < len(good); n++ {
			unwrap(t, "shop", good[:n], aad, api.ErrCorrupt)
		}
	})
	t.Run("with a byte too many", func(t *testing.T) {
		unwrap(t, "shop", append(bytes.Clone(good), 0), aad, api.ErrCorrupt)
	})
	t.Run("altered anywhere", func(t *testing.T) {
		for i := range good {
			bad := bytes.Clone(good)
			bad[i] ^= 0x40
			unwrap(t, "shop", bad, aad, api.ErrCorrupt, api.ErrWrongKey)
		}
	})
	t.Run("of another key", func(t *testing.T) {
		unwrap(t, "bank", good, aad, api.ErrWrongKey)
	})
	t.Run("with the identity of another key put in", func(t *testing.T) {
		foreign := wrap(t, c, "bank", plain, aad)
		mixed := bytes.Clone(good)
		copy(mixed[6:22], foreign[6:22])
		unwrap(t, "shop", mixed, aad, api.ErrWrongKey)
		unwrap(t, "bank", mixed, aad, api.ErrCorrupt)
	})
	t.Run("with another aad", func(t *testing.T) {
		unwrap(t, "shop", good, []byte("table people"), api.ErrCorrupt)
		unwrap(t, "shop", good, nil, api.ErrCorrupt)
	})
	t.Run("not an envelope at all", func(t *testing.T) {
		unwrap(t, "shop", []byte("vault:v1:8SDd3WHDOjf7mq69CyCqYjBXAiQQAVZRkFM13ok481zoCmHnSeDX9vyf7w=="), aad, api.ErrCorrupt)
		unwrap(t, "shop", random(200), aad, api.ErrCorrupt)
	})
	t.Run("of a key that there is not", func(t *testing.T) {
		unwrap(t, "no-such-key", good, aad, api.ErrNotFound)
	})
	t.Run("in a batch only the bad ones fail", func(t *testing.T) {
		results, err := c.Batch(t.Context(), api.OpUnwrap, "shop", []api.Item{{Wrapped: good, AAD: aad}, {Wrapped: good[:20], AAD: aad}, {Wrapped: good, AAD: aad}})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(results[0].Plaintext, plain) || !errors.Is(results[1].Error, api.ErrCorrupt) || !bytes.Equal(results[2].Plaintext, plain) {
			t.Errorf("got %+v", results)
		}
	})
	if got, err := c.Unwrap(t.Context(), "shop", good, aad); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("the good one does not unwrap any more: %v", err)
	}
}

func TestBadRequests(t *testing.T) {
	s := start(t)
	createKey(t, dial(t, s), "shop")
	big := base64.StdEncoding.EncodeToString(make([]byte, 2<<20))
	tests := []struct {
		name, method, path, body string
		noToken                  bool
		status                   int
		code                     api.Code
	}{
		{name: "no token", method: "GET", path: "/v1/keys", noToken: true, status: 401, code: api.CodeUnauthenticated},
		{name: "not JSON", method: "POST", path: "/v1/keys/shop/wrap", body: "plaintext=x", status: 400, code: api.CodeBadRequest},
		{name: "an unknown field", method: "POST", path: "/v1/keys/shop/wrap", body: `{"plaintxt":"AA=="}`, status: 400, code: api.CodeBadRequest},
		{name: "not base64", method: "POST", path: "/v1/keys/shop/wrap", body: `{"plaintext":"%%"}`, status: 400, code: api.CodeBadRequest},
		{name: "nothing to wrap", method: "POST", path: "/v1/keys/shop/wrap", body: `{}`, status: 400, code: api.CodeBadRequest},
		{name: "two documents", method: "POST", path: "/v1/keys/shop/wrap", body: `{"plaintext":"AA=="}{}`, status: 400, code: api.CodeBadRequest},
		{name: "a body over the limit", method: "POST", path: "/v1/keys/shop/wrap", body: `{"plaintext":"` + big + `"}`, status: 413, code: api.CodeTooLarge},
		{name: "a plaintext over the limit", method: "POST", path: "/v1/keys/shop/wrap", body: `{"plaintext":"` + big[:88000] + `"}`, status: 413, code: api.CodeTooLarge},
		{name: "a name that is none", method: "POST", path: "/v1/keys", body: `{"name":"../shop"}`, status: 400, code: api.CodeBadRequest},
		{name: "a type that is none", method: "POST", path: "/v1/keys", body: `{"name":"x","type":"des"}`, status: 400, code: api.CodeBadRequest},
		{name: "a group that is none", method: "POST", path: "/v1/keys", body: `{"name":"x","group":"none"}`, status: 404, code: api.CodeNotFound},
		{name: "a name that is taken", method: "POST", path: "/v1/keys", body: `{"name":"shop"}`, status: 409, code: api.CodeExists},
		{name: "a key that there is not", method: "GET", path: "/v1/keys/none", status: 404, code: api.CodeNotFound},
		{name: "a route that there is not", method: "GET", path: "/v1/none", status: 404, code: api.CodeNotFound},
		{name: "too many random bytes", method: "GET", path: "/v1/random?bytes=1000000", status: 400, code: api.CodeBadRequest},
		{name: "a number that is none", method: "GET", path: "/v1/keys?limit=many", status: 400, code: api.CodeBadRequest},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			token := s.Env.Token
			if tt.noToken {
				token = ""
			}
			status, body := request(t, s, tt.method, tt.path, token, tt.body)
			var answer struct{ Error api.Error }
			if err := json.Unmarshal(body, &answer); err != nil {
				t.Fatalf("the answer is not the error shape: %s", body)
			}
			if status != tt.status || answer.Error.Code != tt.code {
				t.Errorf("got %d %s (%s), want %d %s", status, answer.Error.Code, answer.Error.Message, tt.status, tt.code)
			}
			if answer.Error.Message == "" || answer.Error.RequestID == "" {
				t.Errorf("no message or request id: %s", body)
			}
		})
	}
}

// request speaks HTTP itself, for what the client would not send.
func request(t *testing.T, s *devserver.Server, method, path, token, body string) (status int, answer []byte) {
	t.Helper()
	pool, err := s.Env.RootCAs()
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}
	req, err := http.NewRequestWithContext(t.Context(), method, s.Env.Addr+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, answer
}

func TestNothingIsCalledAbsentWhileNobodyKnows(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	createKey(t, c, "shop")
	wrapped := wrap(t, c, "shop", random(32), nil)
	var pids []int
	for _, m := range group(t, c).Members {
		pids = append(pids, m.DriverPID)
		send(t, m.DriverPID, syscall.SIGSTOP)
		t.Cleanup(func() { syscall.Kill(m.DriverPID, syscall.SIGCONT) })
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		short, cancel := context.WithTimeout(ctx, time.Second)
		_, err := c.Unwrap(short, "shop", wrapped, nil)
		cancel()
		e := api.AsError(err)
		if err == nil || !e.Retryable {
			t.Fatalf("with every driver frozen, unwrap says %v (%s)", err, e.Code)
		}
		if v, err := c.Verify(ctx, "shop"); err == nil {
			for _, copy := range v.Copies {
				if copy.State != "unknown" {
					t.Errorf("with every driver frozen, the copy on %s is %q", copy.Member, copy.State)
				}
			}
		}
	}
	for _, pid := range pids {
		send(t, pid, syscall.SIGCONT)
	}
	awaitWhole(t, c, recoveredIn)
	if _, err := c.Unwrap(t.Context(), "shop", wrapped, nil); err != nil {
		t.Errorf("after SIGCONT: %v", err)
	}
}
