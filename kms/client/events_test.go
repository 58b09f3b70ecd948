package client_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"kmsd/kms/api"
	"kmsd/kms/client"
)

// A stream that breaks is opened again, and the reader hears of it.
func TestEventsAreOpenedAgain(t *testing.T) {
	var opened atomic.Int32
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		if got := r.Header.Get("Authorization"); got != "Bearer the-token" {
			t.Errorf("Authorization is %q", got)
		}
		n := opened.Add(1)
		if n == 2 {
			fail(w, 503, api.CodeUnavailable, true)
			return
		}
		fmt.Fprintf(w, ": alive\n\nevent: key\ndata: {\"type\":\"key\",\"key\":\"shop-%d\"}\n\n", n)
	})
	var seen []string
	for e := range c.Events(t.Context()) {
		seen = append(seen, e.Type+" "+e.Key)
		if e.Time.IsZero() == (e.Type == api.EventDropped) {
			t.Errorf("time of %+v", e)
		}
		if len(seen) == 3 {
			break
		}
	}
	if got := strings.Join(seen, ", "); got != "key shop-1, dropped , key shop-3" {
		t.Errorf("seen %s", got)
	}
}

// Who may not see events does not ask for ever.
func TestEventsEndWhenDenied(t *testing.T) {
	c, _ := serve(t, nil, func(w http.ResponseWriter, _ *http.Request) { fail(w, 403, api.CodeDenied, false) })
	for e := range c.Events(t.Context()) {
		t.Errorf("event %+v", e)
	}
}

func TestEventsEndWithTheirContext(t *testing.T) {
	c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "data: {\"type\":\"key\"}\n\n")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	n := 0
	for range c.Events(ctx) {
		n++
		cancel()
	}
	if n != 1 {
		t.Errorf("%d events", n)
	}
}

// A line without end, and one that is no event, break the stream and nothing else.
func TestForeignEvents(t *testing.T) {
	for name, stream := range map[string]string{
		"endless": "data: " + strings.Repeat("x", 1<<20),
		"no JSON": "data: {\n\n",
	} {
		var opened atomic.Int32
		c, _ := serve(t, nil, func(w http.ResponseWriter, _ *http.Request) {
			opened.Add(1)
			_, _ = io.WriteString(w, stream)
		})
		for e := range c.Events(t.Context()) {
			if e.Type != api.EventDropped {
				t.Errorf("%s: event %+v", name, e)
			}
			if opened.Load() == 2 {
				break
			}
		}
	}
}

// FuzzAnswers lets the server answer anything to everything: a call returns an
// *api.Error or something that holds what was asked for.
func FuzzAnswers(f *testing.F) {
	for _, body := range []string{
		``, `{}`, `null`, `[]`, `{"error":null}`, `{"error":{"code":""}}`, `{"error":{"code":"denied","message":"no"}}`, `{"error":5}`,
		`{"wrapped":"AAAA","version":1}`, `{"items":[{"error":{"code":"corrupt"}}]}`, `{"keys":[{"versions":null}]}`, `{"groups":[{}]}`,
	} {
		for _, status := range []int{200, 503} {
			f.Add(status, []byte(body))
		}
	}
	type answer struct {
		status int
		body   []byte
	}
	var now atomic.Pointer[answer]
	c, _ := serve(f, func(o *client.Options) { o.Attempts = 1 }, func(w http.ResponseWriter, _ *http.Request) {
		a := now.Load()
		w.WriteHeader(a.status)
		_, _ = w.Write(a.body)
	})
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		if status < 200 || status > 599 || status == 204 || status == 304 {
			return
		}
		now.Store(&answer{status, body})
		check := func(method string, got bool, err error) {
			if err != nil {
				if _, is := err.(*api.Error); !is {
					t.Errorf("%s: %T %v", method, err, err)
				}
			} else if !got {
				t.Errorf("%s: nothing, and no error", method)
			}
		}
		ctx := t.Context()
		w, err := c.Wrap(ctx, "k", []byte("p"), nil)
		check("Wrap", len(w) > 0, err)
		r, err := c.Batch(ctx, api.OpUnwrap, "k", make([]api.Item, 1))
		check("Batch", len(r) == 1, err)
		dk, err := c.DataKey(ctx, "k", 3, nil)
		check("DataKey", len(dk.Plaintext) == 3, err)
		_, err = c.Keys(ctx, api.ListOptions{})
		check("Keys", true, err)
		_, err = c.Ready(ctx)
		check("Ready", true, err)
		_ = c.Status()
	})
}

// FuzzEvents reads any stream: it ends with an error, and every event was in it.
func FuzzEvents(f *testing.F) {
	for _, s := range []string{"", ": alive\n\n", "event: key\ndata: {\"type\":\"key\"}\n\n", "data: null\n\ndata: {}\n", "data: \n", "data: [", "\r\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		events := 0
		err := client.ReadEvents(bytes.NewReader(stream), func() {}, func(api.Event) bool { events++; return true })
		if err == nil || events > bytes.Count(stream, []byte("data: ")) {
			t.Errorf("%d events, %v", events, err)
		}
	})
}
