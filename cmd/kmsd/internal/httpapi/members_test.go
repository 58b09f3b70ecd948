package httpapi_test

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"iter"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/cmd/kmsd/internal/pipetest"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

const spare = `{"name":"hsm-b","driver":"softhsm","pin":{"file":"/b.pin"}}`

const described = `{"driver":"softhsm","sha256":"0a","standby":true,"pin":{"file":"/c.pin"},"settings":{"token_label":"c","pin":"1234"}}`

// What is done to members is in the record, with what was asked for in spite of a rule.
func TestRecordsTellWhatWasDoneToMembers(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	k.ask(t, "POST", "/v1/keys", adminToken, `{"name":"shop"}`)
	k.ask(t, "POST", "/v1/groups/default/members", adminToken, spare)
	k.audit.take()
	const members = "/v1/groups/default/members/"
	for _, c := range []struct {
		method, path, body string
		want               httpapi.Record
	}{
		{"POST", "/v1/groups/default/members", spare, httpapi.Record{Operation: "add", Member: "hsm-b", Spec: "driver=softhsm pin.file=/b.pin", Outcome: "exists"}},
		{"DELETE", members + "hsm-a?force=true", "", httpapi.Record{Operation: "remove", Member: "hsm-a", Force: true, Outcome: "ok"}},
		{"DELETE", members + "hsm-b", "", httpapi.Record{Operation: "remove", Member: "hsm-b", Outcome: "state"}},
		{"POST", members + "hsm-b/drain?force=true", "", httpapi.Record{Operation: "drain", Member: "hsm-b", Force: true, Outcome: "ok"}},
		{"PATCH", members + "hsm-b?force=false", `{"role":"active"}`, httpapi.Record{Operation: "active", Member: "hsm-b", Outcome: "ok"}},
		{"POST", "/v1/groups/default/sync", `{"adopt":true}`, httpapi.Record{Operation: "sync", Adopt: true, Outcome: "ok"}},
		{"POST", "/v1/groups/default/sync", "", httpapi.Record{Operation: "sync", Outcome: "ok"}},
		{"PATCH", members + "hsm-b", `{"role":"secret"}`, httpapi.Record{Operation: "role", Member: "hsm-b", Outcome: "bad_request"}},
		{"POST", members + "hsm-b/recover", "", httpapi.Record{Operation: "recover", Member: "hsm-b", Outcome: "ok"}},
		{"POST", members + "hsm-b/replace", "", httpapi.Record{Operation: "replace", Member: "hsm-b", Outcome: "ok"}},
		{"POST", members + "hsm-b/replace", described, httpapi.Record{Operation: "replace", Member: "hsm-b",
			Spec: "driver=softhsm sha256=0a standby=true pin.file=/c.pin settings.pin=(not recorded) settings.token_label=c", Outcome: "ok"}},
		{"POST", "/v1/groups/default/reinitialize", "", httpapi.Record{Operation: "reinitialize", Outcome: "ok"}},
		{"POST", "/v1/groups/default/check", "", httpapi.Record{Operation: "check", Outcome: "ok"}},
		{"POST", "/v1/keys/shop/rotate", `{"allow_degraded":true}`, httpapi.Record{Key: "shop", Version: 2, AllowDegraded: true, Outcome: "ok"}},
		{"POST", "/v1/keys/shop/rotate", "", httpapi.Record{Key: "shop", Version: 3, Outcome: "ok"}},
	} {
		k.ask(t, c.method, c.path, adminToken, c.body)
		if c.want.Key == "" {
			c.want.Group = "default"
		}
		got := k.audit.take()[0]
		got.Time, got.RequestID, got.Principal, got.Remote, got.Action, got.Duration = time.Time{}, "", "", "", "", 0
		if got != c.want {
			t.Errorf("%s %s %s: recorded %+v, want %+v", c.method, c.path, c.body, got, c.want)
		}
	}
}

func TestWrongRequestsAboutMembersAreRefused(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	const pin = "over-the-wire" // no request has such an id
	for _, c := range []struct {
		why, method, path, body string
		status                  int
		message                 string
	}{
		{"force is neither true nor false", "DELETE", "/members/hsm-a?force=1", "", 400, `parameter "force" wants true or false`},
		{"a sync knows no force", "POST", "/sync?force=true", "", 400, `unknown parameter "force"`},
		{"a member keeps its name", "POST", "/members/hsm-a/replace", spare, 400, "a member keeps its name"},
		{"a role has no default", "PATCH", "/members/hsm-a", "", 400, "the body is empty"},
		{"the role is unknown", "PATCH", "/members/hsm-a", `{"role":"spare"}`, 400, "role"},
		{"a PIN never travels", "POST", "/members", `{"name":"hsm-b","driver":"softhsm","pin":"` + pin + `"}`, 400, `field "pin" wants an object`},
		{"nor inside", "POST", "/members", `{"name":"hsm-b","driver":"softhsm","pin":{"value":"` + pin + `"}}`, 400, "unknown field"},
		{"settings are texts", "POST", "/members", `{"name":"hsm-b","settings":{"slot":1}}`, 400, "settings"},
		{"the member is unknown", "POST", "/members/hsm-z/drain", "", 404, "no member of group default is named hsm-z"},
	} {
		t.Run(c.why, func(t *testing.T) {
			a := k.ask(t, c.method, "/v1/groups/default"+c.path, adminToken, c.body)
			e := a.error(t)
			if a.status != c.status || !strings.Contains(e.Message, c.message) || strings.Contains(string(a.body), pin) {
				t.Errorf("%d %s", a.status, a.body)
			}
		})
	}
}

// What is asked of members may take as long as the client says, and a sync without a
// word as long as it takes. All else keeps to the server's time.
func TestPatience(t *testing.T) {
	var left time.Duration
	service := &apitest.Memory{Fail: func(ctx context.Context, _, _ string) error {
		end, _ := ctx.Deadline()
		left = time.Until(end)
		return nil
	}}
	k := start(t, service, func(c *httpapi.Config) { c.Limits.Timeout = time.Hour })
	k.ask(t, "POST", "/v1/keys", adminToken, `{"name":"shop"}`)
	const recoverPath, syncPath = "/v1/groups/default/members/hsm-a/recover", "/v1/groups/default/sync"
	for _, c := range []struct {
		path, timeout string
		least, most   time.Duration
	}{
		{recoverPath, "", 50 * time.Minute, time.Hour},
		{recoverPath, "20m", 10 * time.Minute, 20 * time.Minute},
		{recoverPath, "3h", 2 * time.Hour, 3 * time.Hour},
		{syncPath, "", 24 * time.Hour, 1 << 62},
		{syncPath, "20m", 10 * time.Minute, 20 * time.Minute},
		{"/v1/keys/shop/rotate", "3h", 50 * time.Minute, time.Hour},
	} {
		var headers []string
		if c.timeout != "" {
			headers = []string{api.TimeoutHeader, c.timeout}
		}
		if a := k.ask(t, "POST", c.path, adminToken, "", headers...); a.status != 200 || left < c.least || left > c.most {
			t.Errorf("%s with timeout %q has %v left: %d %s", c.path, c.timeout, left, a.status, a.body)
		}
	}
}

// A sync outlives the time that the server gives to connections and to all else.
func TestASyncOutlivesTheDeadlinesOfTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		service := &apitest.Memory{Fail: func(ctx context.Context, method, _ string) error {
			if method != "Sync" && method != "Rotate" {
				return nil
			}
			ctx, cancel := context.WithTimeout(ctx, time.Hour)
			defer cancel()
			<-ctx.Done()
			return nil
		}}
		ask := inBubble(t, service)
		for _, c := range []struct {
			path string
			took time.Duration
		}{{"/v1/groups/default/sync", time.Hour}, {"/v1/keys/shop/rotate", 30 * time.Second}} {
			began := time.Now()
			status := ask(http.MethodPost, c.path)
			if took := time.Since(began); took != c.took || (status == http.StatusOK) != (c.took == time.Hour) {
				t.Errorf("%s: status %d after %v, want to wait for %v", c.path, status, took, c.took)
			}
		}
	})
}

// inBubble serves in a bubble until its test ends. ask is the admin's, who is told the
// status of the answer.
func inBubble(t *testing.T, service *apitest.Memory) (ask func(method, path string) int) {
	t.Helper()
	h, err := httpapi.New(httpapi.Config{Service: service, Auth: tokens{}, Audit: new(auditLog)})
	if err != nil {
		t.Fatal(err)
	}
	l := pipetest.Listen()
	server := httpapi.Server(h, nil, nil)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	transport := &http.Transport{DialContext: l.Dial}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		if err := server.Shutdown(context.Background()); err != nil {
			t.Errorf("shutting down: %v", err)
		}
		<-served
	})
	return func(method, path string) int {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, "http://kmsd"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+adminToken)
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode
	}
}

func TestStoppingTheServerEndsASync(t *testing.T) {
	begun := make(chan struct{})
	service := &apitest.Memory{Fail: func(ctx context.Context, method, _ string) error {
		if method != "Sync" {
			return nil
		}
		close(begun)
		<-ctx.Done()
		return api.NewError(api.CodeDeadline, "the request's time is over", ctx.Err())
	}}
	k := start(t, service, nil)
	answers := make(chan answer)
	go func() { answers <- k.ask(t, "POST", "/v1/groups/default/sync", adminToken, "") }()
	<-begun
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stopped := make(chan error, 1)
	go func() { stopped <- k.server.Shutdown(ctx) }()
	e := (<-answers).wants(t, 503, api.CodeUnavailable)
	if e.Message != "kmsd is being stopped" || e.Hint == "" {
		t.Errorf("%+v", e)
	}
	if err := <-stopped; err != nil {
		t.Errorf("shutting down: %v", err)
	}
}

// pastMemory is a Memory whose log has what it is given.
type pastMemory struct {
	*apitest.Memory
	log []api.Event
}

func (p pastMemory) Log(_ context.Context, last int) ([]api.Event, error) {
	return p.log[max(0, len(p.log)-last):], nil
}

// tellingMemory tells an event of its log once more to everybody who listens, and then
// another.
type tellingMemory struct {
	pastMemory
	again api.Event
}

func (m tellingMemory) Events(context.Context) iter.Seq[api.Event] {
	return func(yield func(api.Event) bool) {
		next := m.again
		next.To = "active"
		_ = yield(m.again) && yield(next)
	}
}

// A stream that begins with the past goes on without a gap and tells nothing twice.
func TestEventsBeginWithTheLog(t *testing.T) {
	service := new(apitest.Memory)
	k := start(t, service, nil)
	c := k.client(t, nil)
	if _, err := c.AddMember(t.Context(), "default", apitest.MemorySpare("hsm-b")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Drain(t.Context(), "default", "hsm-b", false); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var got []string
	for e := range c.EventsAfter(ctx, 1) {
		got = append(got, e.From+">"+e.To)
		if len(got) == 2 {
			break
		}
		if err := c.Recover(t.Context(), "default", "hsm-b"); err != nil { // the stream is open
			t.Fatal(err)
		}
	}
	if text := strings.Join(got, " "); text != "active>draining draining>active" {
		t.Errorf("the stream tells %q", text)
	}
}

// What happens between the subscription and the look at the log is in both.
func TestEventsAreNotToldTwice(t *testing.T) {
	memory := new(apitest.Memory)
	doubled := api.Event{Time: time.Now(), Type: api.EventMember, Group: "default", Member: "hsm-a", To: "down"}
	service := tellingMemory{pastMemory{memory, []api.Event{doubled}}, doubled}
	k := start(t, memory, func(c *httpapi.Config) { c.Service = service })
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, k.addr+"/v1/events?last=5", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+adminToken)
	resp, err := k.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var told []string
	for lines := bufio.NewScanner(resp.Body); len(told) < 2 && lines.Scan(); {
		if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
			var e api.Event
			if err := json.Unmarshal([]byte(data), &e); err != nil {
				t.Fatal(err)
			}
			told = append(told, e.To)
		}
	}
	if text := strings.Join(told, " "); text != "down active" {
		t.Errorf("the stream tells %q", text)
	}
}

// Events of keys in the log are for those who may read the key.
func TestLogShowsWhatTheCallerMayKnow(t *testing.T) {
	memory := new(apitest.Memory)
	service := pastMemory{memory, []api.Event{
		{Time: time.Now(), Type: api.EventKey, Key: "shop", To: "created"},
		{Time: time.Now(), Type: api.EventMember, Group: "default", Member: "hsm-a", To: "down"},
	}}
	k := start(t, memory, func(c *httpapi.Config) { c.Service = service })
	for token, want := range map[string]int{adminToken: 2, groupToken: 1} {
		var body api.LogBody
		a := k.ask(t, "GET", "/v1/log?last=9", token, "")
		if err := json.Unmarshal(a.body, &body); err != nil || len(body.Events) != want {
			t.Errorf("%s gets %d %s", token, a.status, a.body)
		}
	}
	for _, last := range []string{"0", "-1", "x", "100001"} {
		k.ask(t, "GET", "/v1/log?last="+last, adminToken, "").wants(t, 400, api.CodeBadRequest)
		k.ask(t, "GET", "/v1/events?last="+last, adminToken, "").wants(t, 400, api.CodeBadRequest)
	}
}

// A log that cannot be read is an answer, before the stream begins.
func TestAStreamWithoutItsPastIsRefused(t *testing.T) {
	service := &apitest.Memory{Fail: func(_ context.Context, method, _ string) error {
		if method == "Log" {
			return api.NewError(api.CodeUnavailable, "it is being closed", nil)
		}
		return nil
	}}
	k := start(t, service, nil)
	k.ask(t, "GET", "/v1/events?last=1", adminToken, "").wants(t, 503, api.CodeUnavailable)
	if r := k.audit.take(); len(r) != 1 || r[0].Outcome != "unavailable" {
		t.Errorf("recorded %+v", r)
	}
	if n := service.Readers(); n != 0 {
		t.Errorf("%d readers are left", n)
	}
}
