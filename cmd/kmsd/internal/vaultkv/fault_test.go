package vaultkv_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/cmd/kmsd/internal/vaultkv"
	"kmsd/kms/api"
)

const get = "GET /v1/mariadb/data/1 HTTP/1.1\nHost: kms.example\nX-Vault-Token: " + token

// failing makes the calls of the service fail.
func (s *site) failing(err error) {
	s.faults.set(func(context.Context) error { return err })
}

// MariaDB uses the keys that it has in memory only when a connection fails.
func TestAFaultHasNoAnswer(t *testing.T) {
	tests := map[string]struct {
		err  error
		want api.Code
	}{
		"a group is lost":             {api.NewError(api.CodeGroupLost, "no member answers", nil), api.CodeGroupLost},
		"it cannot be told now":       {api.NewError(api.CodeUnavailable, "not now", nil), api.CodeUnavailable},
		"the time is over":            {api.NewError(api.CodeDeadline, "over", nil), api.CodeDeadline},
		"a member has failed":         {api.NewError(api.CodeMemberFailed, "gone", nil), api.CodeMemberFailed},
		"too few copies":              {api.NewError(api.CodeInsufficientCopies, "one of two", nil), api.CodeInsufficientCopies},
		"too many requests":           {api.NewError(api.CodeRateLimited, "later", nil), api.CodeRateLimited},
		"a fault of kmsd":             {api.NewError(api.CodeInternal, "oh", nil), api.CodeInternal},
		"an error that is not an api": {errors.New("oh"), api.CodeInternal},
		"an envelope is damaged":      {api.NewError(api.CodeCorrupt, "altered", nil), api.CodeCorrupt},
		"an envelope is another's":    {api.NewError(api.CodeWrongKey, "another", nil), api.CodeWrongKey},
	}
	s := start(t, nil)
	client := http2Client(t)
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s.failing(tt.err)
			for _, request := range []string{get, strings.Replace(get, "GET", "POST", 1) + "\n\n" + `{"data":{"data":"` + hex16 + `"}}`,
				strings.Replace(get, "data/1", "rotate/1", 1), strings.Replace(get, "data/1", "metadata/1", 1), strings.Replace(get, "data/1", "metadata/?list=true", 1)} {
				request = strings.Replace(request, "GET /v1/mariadb/rotate", "POST /v1/mariadb/rotate", 1)
				before := s.trail.count()
				if status, body, err := s.ask(t, request); err == nil {
					t.Errorf("%.40s: answered %d %s", request, status, body)
				}
				if got := s.trail.last(); s.trail.count() != before+1 || got.Outcome != string(tt.want) || got.Database != "shop" {
					t.Errorf("%.40s: recorded %+v", request, got)
				}
			}
			if res, err := client.Do(http2Get(t, s, "/v1/mariadb/data/1")); err == nil {
				res.Body.Close()
				t.Errorf("HTTP/2: answered %s", res.Status)
			}
		})
	}
}

const hex16 = "00112233445566778899aabbccddeeff"

func http2Get(t *testing.T, s *site, path string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+s.addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-Vault-Token", token)
	return r
}

// A kmsd whose catalog is not the one that it had knows nothing of a mount's database. A
// client that is told that its key is not there may make another.
func TestAMountWithoutItsDatabaseSaysNothingOfKeys(t *testing.T) {
	s := start(t, nil)
	mounted := func(method, below string) string {
		return method + " /v1/later/" + below + " HTTP/1.1\nHost: kms.example\nX-Vault-Token: " + token
	}
	for _, request := range []string{
		mounted("GET", "data/1"), mounted("GET", "data/1?version=1"), mounted("GET", "metadata/1"), mounted("GET", "metadata/?list=true"), mounted("DELETE", "data/1"),
	} {
		if status, body, err := s.ask(t, request); err == nil {
			t.Errorf("%.40s: answered %d %s", request, status, body)
		}
		if got := s.trail.last(); got.Outcome != string(api.CodeNotFound) || got.Database != "later" {
			t.Errorf("%.40s: recorded %+v", request, got)
		}
	}
	for _, request := range []string{mounted("POST", "data/1") + "\n\n" + `{"data":{"a":"b"}}`, mounted("POST", "rotate/1")} {
		if status, body, err := s.ask(t, request); err != nil || status != http.StatusNotFound || !strings.Contains(body, "there is no database later") {
			t.Errorf("%.40s: got %d %s, %v; want to be told that nothing was written, and why", request, status, body, err)
		}
	}
}

func TestAPanicHasNoAnswer(t *testing.T) {
	s := start(t, nil)
	s.faults.set(func(context.Context) error { panic("a plaintext") })
	if status, _, err := s.ask(t, get); err == nil {
		t.Errorf("answered %d", status)
	}
	if got := s.trail.last().Outcome; got != string(api.CodeInternal) {
		t.Errorf("recorded as %q", got)
	}
}

func TestWhatSomebodyHasDecidedIsAnswered(t *testing.T) {
	tests := map[string]struct {
		err    error
		status int
		body   string
	}{
		"a key is disabled":           {api.NewError(api.CodeState, "key shop is disabled", nil), 403, `{"errors":["key shop is disabled"]}`},
		"a policy forbids it":         {api.NewError(api.CodeDenied, "no policy", nil), 403, `{"errors":["permission denied"]}`},
		"there is no such thing":      {api.NewError(api.CodeNotFound, "no such thing", nil), 404, `{"errors":[]}`},
		"it can never succeed":        {api.NewError(api.CodeBadRequest, "not like this", nil), 400, `{"errors":["not like this"]}`},
		"it is too large":             {api.NewError(api.CodeTooLarge, "too large", nil), 413, `{"errors":["too large"]}`},
		"the newest is another":       {api.NewError(api.CodeState, "3, not 2", api.ErrCAS), 400, `{"errors":["check-and-set parameter did not match the current version"]}`},
		"there is one already":        {api.NewError(api.CodeExists, "3, not none", api.ErrCAS), 400, `{"errors":["check-and-set parameter did not match the current version"]}`},
		"its cause says the same too": {fmt.Errorf("reading: %w", api.NewError(api.CodeNotFound, "no", nil)), 404, `{"errors":[]}`},
	}
	s := start(t, nil)
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s.failing(tt.err)
			status, body, err := s.ask(t, get)
			if err != nil || status != tt.status || strings.TrimSpace(body) != tt.body {
				t.Errorf("got %d %s, %v", status, body, err)
			}
		})
	}
}

func TestNothingIsAnsweredWithoutARecord(t *testing.T) {
	s := start(t, nil)
	s.put(t, "shop", "1", api.NamedKeyPut{})
	s.trail.mu.Lock()
	s.trail.fail = errors.New("the disk is full")
	s.trail.mu.Unlock()
	for _, request := range []string{
		get, strings.Replace(get, "data/1", "data/2", 1), strings.Replace(get, token, "nobody", 1), strings.Replace(get, "mariadb", "oracle", 1),
	} {
		if status, body, err := s.ask(t, request); err == nil {
			t.Errorf("%.40s: answered %d %s", request, status, body)
		}
	}
}

// requestTime is what a request has unless the configuration says otherwise.
const requestTime = 8 * time.Second

// hold lets calls of the service wait until release is called.
func (s *site) hold() (held <-chan struct{}, release func()) {
	entered, free := make(chan struct{}, 1), make(chan struct{})
	s.faults.set(func(ctx context.Context) error {
		entered <- struct{}{}
		select {
		case <-free:
			return nil
		case <-ctx.Done():
			return api.NewError(api.CodeDeadline, "the request's time is over", ctx.Err())
		}
	})
	return entered, func() { close(free) }
}

func TestARequestOverTheLimitIsTurnedAwayWithoutAnAnswer(t *testing.T) {
	s := start(t, func(cfg *vaultkv.Config) { cfg.InFlight = 1 })
	s.put(t, "shop", "1", api.NamedKeyPut{})
	held, release := s.hold()
	first := s.dial(t)
	first.send(t, get)
	<-held
	if status, body, err := s.ask(t, get); err == nil {
		t.Errorf("answered %d %s", status, body)
	}
	release()
	if status, body, err := first.receive(); err != nil || status != http.StatusOK {
		t.Errorf("the one before it got %d %s, %v", status, body, err)
	}
}

func TestNobodyTakesTheRoomOfOthers(t *testing.T) {
	s := start(t, func(cfg *vaultkv.Config) { cfg.InFlight = 4 })
	s.put(t, "shop", "1", api.NamedKeyPut{})
	held, release := s.hold()
	first := s.dial(t)
	first.send(t, get)
	<-held
	if status, body, err := s.ask(t, get); err == nil {
		t.Errorf("a second one of the same principal was answered %d %s", status, body)
	}
	if got := s.trail.last().Outcome; got != string(api.CodeRateLimited) {
		t.Errorf("recorded as %q", got)
	}
	other := "GET /v1/sys/mounts/mariadb HTTP/1.1\nHost: x\nX-Vault-Token: " + listener
	if status, body, err := s.ask(t, other); err != nil || status != http.StatusOK {
		t.Errorf("another principal got %d %s, %v", status, body, err)
	}
	release()
	if status, body, err := first.receive(); err != nil || status != http.StatusOK {
		t.Errorf("the first got %d %s, %v", status, body, err)
	}
	if status, body, err := s.ask(t, get); err != nil || status != http.StatusOK {
		t.Errorf("the same principal got %d %s, %v after that", status, body, err)
	}
}

func TestARequestHasItsTimeAndThenNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := startInBubble(t)
		_, release := s.hold()
		defer release()
		began := time.Now()
		if status, _, err := s.ask(t, get); err == nil {
			t.Errorf("answered %d", status)
		}
		if took := time.Since(began); took != requestTime {
			t.Errorf("it ended after %v, want %v", took, requestTime)
		}
		if got := s.trail.last().Outcome; got != string(api.CodeDeadline) {
			t.Errorf("recorded as %q", got)
		}
	})
}

func TestABodyThatNeverEndsHasNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := startInBubble(t)
		c := s.dial(t)
		began := time.Now()
		c.send(t, strings.Replace(get, "GET", "POST", 1)+"\nContent-Length: 100")
		if status, _, err := c.receive(); err == nil {
			t.Errorf("answered %d", status)
		}
		if took := time.Since(began); took != requestTime {
			t.Errorf("it ended after %v, want %v", took, requestTime)
		}
	})
}

func TestABodyOverTheLimitIsRefused(t *testing.T) {
	s := start(t, nil)
	post := strings.Replace(get, "GET /v1/mariadb", "POST /v1/team/db1", 1) + "\n\n"
	for name, tt := range map[string]struct {
		body string
		want string
	}{
		"a value of 64 KiB and more": {`{"data":{"v":"` + strings.Repeat("x", api.MaxPlaintext) + `"}}`, "data is longer than 65536 bytes"},
		"a body of 128 KiB and more": {`{"data":{"v":"x"}}` + strings.Repeat(" ", 128<<10), ""},
		"a body nested too deep":     {`{"data":{"v":` + strings.Repeat("[", 63) + strings.Repeat("]", 63) + `}}`, "nested too deep"},
		"a body nested far too deep": {`{"data":{"v":` + strings.Repeat("[", 50000) + strings.Repeat("]", 50000) + `}}`, "not JSON"},
	} {
		t.Run(name, func(t *testing.T) {
			status, body, err := s.ask(t, post+tt.body+"\n")
			if err != nil || status != 413 && status != 400 || !strings.Contains(body, tt.want) {
				t.Errorf("got %d %s, %v", status, body, err)
			}
		})
	}
	largest := `{"v":"` + strings.Repeat("x", api.MaxPlaintext-8) + `"}`
	if status, body, err := s.ask(t, post+`{"data": `+largest+`}`); err != nil || status != 200 {
		t.Errorf("the largest: got %d %s, %v", status, body, err)
	}
}

func TestStrangersAreCounted(t *testing.T) {
	s := start(t, nil)
	c := s.dial(t)
	const n = 150
	for range n {
		c.send(t, strings.Replace(get, token, "nobody", 1))
		if status, _, err := c.receive(); err != nil || status != http.StatusForbidden {
			t.Fatalf("got %d, %v", status, err)
		}
	}
	s.end()
	records, told := 0, 0
	for _, r := range s.trail.records {
		if r.Principal != "" || r.Outcome != string(api.CodeUnauthenticated) {
			t.Errorf("recorded %+v", r)
		}
		records++
		told += max(1, r.Suppressed)
	}
	if told != n || records >= n {
		t.Errorf("%d records tell of %d requests, want fewer of %d", records, told, n)
	}
}
