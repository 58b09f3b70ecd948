package httpapi_test

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

func TestMetricsNeedNoPrincipal(t *testing.T) {
	var fault error
	k := start(t, new(apitest.Memory), func(c *httpapi.Config) {
		c.Metrics = func() ([]byte, error) { return []byte("kmsd_ready 1\n"), fault }
	})
	a := k.ask(t, "GET", "/metrics", "", "")
	if a.status != 200 || string(a.body) != "kmsd_ready 1\n" {
		t.Errorf("GET /metrics: %d %s", a.status, a.body)
	}
	if got := a.header.Get("Content-Type"); got != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("it is %q", got)
	}
	if got := k.audit.take(); len(got) != 0 {
		t.Errorf("a scrape is written down: %+v", got)
	}
	fault = errors.New("secret detail")
	if e := k.ask(t, "GET", "/metrics", "", "").wants(t, 500, api.CodeInternal); strings.Contains(e.Message, "secret") {
		t.Errorf("strangers are told %q", e.Message)
	}
}

// observed is what Observe was told.
type observed struct {
	action, outcome string
	items, corrupt  int
}

func TestEveryAnswerIsCounted(t *testing.T) {
	var mu sync.Mutex // guards got
	var got []observed
	k := start(t, new(apitest.Memory), func(c *httpapi.Config) {
		c.Observe = func(action, outcome string, items int, failed map[api.Code]int, took time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			if took <= 0 {
				t.Errorf("%s took %v", action, took)
			}
			got = append(got, observed{action, outcome, items, failed[api.CodeCorrupt]})
		}
	})
	k.ask(t, "POST", "/v1/keys", adminToken, `{"name":"shop-db"}`)
	k.ask(t, "POST", "/v1/keys/shop-db/wrap", adminToken, `{"plaintext":"YWJj"}`)
	k.ask(t, "POST", "/v1/keys/shop-db/wrap", adminToken, `{"items":[{"plaintext":"YWJj"},{"plaintext":"ZGVm"}]}`)
	k.ask(t, "POST", "/v1/keys/shop-db/unwrap", adminToken, `{"items":[{"wrapped":"YWJj"},{"wrapped":"ZGVm"},{"wrapped":"Z2hp"}]}`)
	k.ask(t, "POST", "/v1/keys/shop-db/wrap", nobodyToken, `{"plaintext":"YWJj"}`)
	k.ask(t, "POST", "/v1/keys/shop-db/wrap", "no such token", `{"plaintext":"YWJj"}`)
	k.ask(t, "GET", "/v1/groups/no-such-group", adminToken, "")
	k.audit.setBroken(true)
	k.ask(t, "GET", "/v1/groups", adminToken, "")
	want := []observed{
		{"create", "ok", 0, 0}, {"wrap", "ok", 0, 0}, {"wrap", "ok", 2, 0}, {"unwrap", "ok", 3, 3}, {"wrap", "denied", 0, 0},
		{"wrap", "unauthenticated", 0, 0}, {"group-read", "not_found", 0, 0}, {"group-read", "internal", 0, 0},
	}
	mu.Lock()
	defer mu.Unlock()
	if !slices.Equal(got, want) {
		t.Errorf("counted %v\nwant    %v", got, want)
	}
}
