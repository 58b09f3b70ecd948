package httpapi_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/cmd/kmsd/internal/auth"
	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

// request is one that works, for a row of the table.
type request struct {
	method, path, body string
	row                httpapi.Row
	key                string // that the record has to name
	member             string // the same
	database, named    string // the same, of a data key the ID
}

// workingRequests returns one for each route, in an order in which all of them
// work one after another, and fails the test if a route has none.
func workingRequests(t testing.TB, service *apitest.Memory) []request {
	t.Helper()
	for name, kind := range map[string]string{"shop": "aes-256", "ec": "ec-p256", "rsa": "rsa-2048", "hmac": "hmac-sha256"} {
		if _, err := service.CreateMasterKey(t.Context(), name, api.KeyOptions{Type: kind}); err != nil {
			t.Fatal(err)
		}
	}
	wrapped, err := service.Wrap(t.Context(), "shop", []byte("p"), nil)
	if err != nil {
		t.Fatal(err)
	}
	digest := make([]byte, 32)
	sig, err := service.Sign(t.Context(), "ec", api.SignRequest{Digest: digest})
	if err != nil {
		t.Fatal(err)
	}
	ciphertext := oaep(t, service, "rsa")
	if _, err := service.CreateDatabase(t.Context(), "erp", api.DatabaseOptions{}); err != nil {
		t.Fatal(err)
	}
	job, err := service.Rekey(t.Context(), "erp", api.RekeyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.StdEncoding.EncodeToString
	list := []request{
		{method: "POST", path: "/v1/keys", body: `{"name":"new"}`, key: "new"},
		{method: "GET", path: "/v1/keys"},
		{method: "GET", path: "/v1/keys/shop", key: "shop"},
		{method: "PATCH", path: "/v1/keys/shop", body: `{"rotation_period":"24h"}`, key: "shop"},
		{method: "POST", path: "/v1/keys/shop/rotate", key: "shop"},
		{method: "POST", path: "/v1/keys/shop/verify", key: "shop"},
		{method: "POST", path: "/v1/keys/shop/wrap", body: `{"plaintext":"cA=="}`, key: "shop"},
		{method: "POST", path: "/v1/keys/shop/unwrap", body: `{"wrapped":"` + b64(wrapped) + `"}`, key: "shop"},
		{method: "POST", path: "/v1/keys/shop/rewrap", body: `{"wrapped":"` + b64(wrapped) + `"}`, key: "shop"},
		{method: "POST", path: "/v1/keys/shop/datakey", body: `{}`, key: "shop"},
		{method: "POST", path: "/v1/keys/ec/sign", body: `{"digest":"` + b64(digest) + `"}`, key: "ec"},
		{method: "POST", path: "/v1/keys/ec/verify-signature", body: `{"digest":"` + b64(digest) + `","signature":"` + b64(sig.Signature) + `"}`, key: "ec"},
		{method: "POST", path: "/v1/keys/rsa/decrypt", body: `{"ciphertext":"` + b64(ciphertext) + `"}`, key: "rsa"},
		{method: "POST", path: "/v1/keys/hmac/mac", body: `{"message":"bQ=="}`, key: "hmac"},
		{method: "POST", path: "/v1/keys/shop/disable", key: "shop"},
		{method: "POST", path: "/v1/keys/shop/enable", key: "shop"},
		{method: "DELETE", path: "/v1/keys/shop?window=1h", key: "shop"},
		{method: "POST", path: "/v1/keys/shop/restore", key: "shop"},
		{method: "POST", path: "/v1/keys/ec/disable?version=1", key: "ec"},
		{method: "POST", path: "/v1/keys/ec/enable?version=1", key: "ec"},
		{method: "DELETE", path: "/v1/keys/ec?version=1&window=1h", key: "ec"},
		{method: "POST", path: "/v1/keys/ec/restore?version=1", key: "ec"},
		{method: "POST", path: "/v1/databases", body: `{"name":"crm","key":"crm-master"}`, key: "crm-master", database: "crm"},
		{method: "GET", path: "/v1/databases"},
		{method: "GET", path: "/v1/databases/erp", database: "erp"},
		{method: "PUT", path: "/v1/databases/erp/keys/1", body: `{"plaintext":"MTIzNDU2Nzg5MDEyMzQ1Ng=="}`, database: "erp", named: "1"},
		{method: "PUT", path: "/v1/databases/erp/keys/a%2F%00..%FF", database: "erp", named: "a/\x00..\xff"},
		{method: "POST", path: "/v1/databases/erp/keys/1/rotate", database: "erp", named: "1"},
		{method: "GET", path: "/v1/databases/erp/keys/1?version=1", database: "erp", named: "1"},
		{method: "GET", path: "/v1/databases/erp/keys/1/metadata", database: "erp", named: "1"},
		{method: "GET", path: "/v1/databases/erp/keys?limit=1", database: "erp"},
		{method: "POST", path: "/v1/databases/erp/rekey", body: `{"retire":"disable"}`, database: "erp"},
		{method: "GET", path: "/v1/jobs/" + job.ID, database: "erp"},
		{method: "DELETE", path: "/v1/databases/erp/keys/1", database: "erp", named: "1"},
		{method: "POST", path: "/v1/backup", body: `{"recipients":["age1reader"]}`},
		{method: "GET", path: "/v1/random?bytes=16"},
		{method: "GET", path: "/v1/groups"},
		{method: "GET", path: "/v1/groups/default"},
		{method: "POST", path: "/v1/groups/default/members/hsm-a/recover", member: "hsm-a"},
		{method: "POST", path: "/v1/groups/default/members", body: `{"name":"hsm-b","driver":"softhsm","pin":{"file":"/b.pin"},"settings":{"token_label":"b"}}`},
		{method: "PATCH", path: "/v1/groups/default/members/hsm-b", body: `{"role":"standby"}`, member: "hsm-b"},
		{method: "POST", path: "/v1/groups/default/members/hsm-b/drain", member: "hsm-b"},
		{method: "POST", path: "/v1/groups/default/members/hsm-b/replace", member: "hsm-b"},
		{method: "DELETE", path: "/v1/groups/default/members/hsm-b?force=true", member: "hsm-b"},
		{method: "POST", path: "/v1/groups/default/sync", body: `{"adopt":true}`},
		{method: "POST", path: "/v1/groups/default/reinitialize"},
		{method: "POST", path: "/v1/groups/default/check"},
		{method: "GET", path: "/v1/log?last=2"},
		{method: "GET", path: "/v1/events"},
	}
	missing := make(map[httpapi.Row]bool)
	for _, row := range httpapi.Rows() {
		missing[row] = true
		for i := range list {
			if list[i].method == row.Method && matches(row.Pattern, list[i].path) {
				list[i].row = row
				delete(missing, row)
			}
		}
	}
	for row := range missing {
		t.Errorf("route %s %s has no request here", row.Method, row.Pattern)
	}
	for _, r := range list {
		if r.row.Pattern == "" {
			t.Errorf("request %s %s has no route", r.method, r.path)
		}
	}
	return list
}

func matches(pattern, path string) bool {
	path, _, _ = strings.Cut(path, "?")
	want, got := strings.Split(pattern, "/"), strings.Split(path, "/")
	if len(want) != len(got) {
		return false
	}
	for i := range want {
		if want[i] != got[i] && !strings.HasPrefix(want[i], "{") {
			return false
		}
	}
	return true
}

// Every route of the table asks who it is and whether they may, and leaves a record
// of it either way.
func TestEveryRouteIsGuardedAndAudited(t *testing.T) {
	service := new(apitest.Memory)
	k := start(t, service, func(c *httpapi.Config) { c.Limits.Strangers = 1000 }) // two for each route
	for _, r := range workingRequests(t, service) {
		t.Run(r.method+" "+r.path, func(t *testing.T) {
			for _, c := range []struct {
				token, principal, outcome string
				status                    int
			}{
				{"", "", "unauthenticated", 401},
				{"wrong", "", "unauthenticated", 401},
				{nobodyToken, "nobody", "denied", 403},
				{adminToken, "admin", "ok", 200},
			} {
				a := r.send(t, k, c.token)
				if a.status != c.status {
					t.Errorf("with token %q: %d %s, want %d", c.token, a.status, a.body, c.status)
				}
				if c.status != 200 {
					a.wants(t, c.status, api.Code(c.outcome))
				}
				records := k.audit.take()
				if r.path == "/v1/backup" && c.status == 200 && len(records) == 2 && records[0].Operation == "begin" {
					records = records[1:]
				}
				if len(records) != 1 {
					t.Fatalf("with token %q: %d records", c.token, len(records))
				}
				got := records[0]
				if got.Outcome != c.outcome || got.Principal != c.principal || got.Action != r.row.Action || got.Time.IsZero() ||
					got.RequestID != a.header.Get(api.RequestIDHeader) || !strings.HasPrefix(got.Remote, "127.0.0.1:") {
					t.Errorf("with token %q: record %+v", c.token, got)
				}
				if c.principal != "" && got.Key != r.key {
					t.Errorf("with token %q: the record names key %q, want %q", c.token, got.Key, r.key)
				}
				if c.principal != "" && (got.Database != r.database || got.NamedKey != r.named) {
					t.Errorf("with token %q: the record names data key %q of %q, want %q of %q", c.token, got.NamedKey, got.Database, r.named, r.database)
				}
				if c.principal != "" && r.member != "" && (got.Member != r.member || got.Group != "default") {
					t.Errorf("with token %q: the record names member %s/%s, want default/%s", c.token, got.Group, got.Member, r.member)
				}
			}
		})
	}
}

// send asks for the answer; of an event stream it takes the head.
func (r request) send(t testing.TB, k *kmsd, token string) answer {
	t.Helper()
	if r.path != "/v1/events" || token != adminToken {
		return k.ask(t, r.method, r.path, token, r.body)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, r.method, k.addr+r.path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := k.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	return answer{status: resp.StatusCode, header: resp.Header}
}

// What is not in the audit log is not answered.
func TestNothingIsReleasedWithoutAudit(t *testing.T) {
	service := new(apitest.Memory)
	k := start(t, service, nil)
	requests := workingRequests(t, service)
	k.audit.setBroken(true)
	for _, r := range requests {
		for _, token := range []string{adminToken, nobodyToken, ""} {
			a := k.ask(t, r.method, r.path, token, r.body)
			e := a.wants(t, 500, api.CodeInternal)
			if e.Message != "the audit log cannot be written" || !strings.Contains(e.Hint, "may have been done") || strings.Contains(string(a.body), "wrapped") {
				t.Errorf("%s %s: %s", r.method, r.path, a.body)
			}
		}
	}
}

// The actions of the routes are those that a policy can allow, all of them.
func TestActionsAreThoseOfPolicies(t *testing.T) {
	used := make(map[string]bool)
	for _, row := range httpapi.Rows() {
		used[row.Action] = true
	}
	for _, action := range auth.Actions() {
		if !used[action] {
			t.Errorf("no route has the action %s", action)
		}
		delete(used, action)
	}
	for action := range used {
		t.Errorf("no policy can allow the action %s of a route", action)
	}
}

// A shop sees its own keys, and learns nothing of others.
func TestPoliciesByName(t *testing.T) {
	service := new(apitest.Memory)
	k := start(t, service, nil)
	for _, name := range []string{"bank", "shop-1", "shop-2"} {
		k.ask(t, "POST", "/v1/keys", adminToken, `{"name":"`+name+`"}`)
	}
	k.ask(t, "POST", "/v1/keys", shopToken, `{"name":"bank2"}`).wants(t, 403, api.CodeDenied)
	k.ask(t, "GET", "/v1/keys/bank", shopToken, "").wants(t, 403, api.CodeDenied)
	k.ask(t, "GET", "/v1/keys/nobank", shopToken, "").wants(t, 403, api.CodeDenied)
	k.ask(t, "GET", "/v1/keys", shopToken, "").wants(t, 403, api.CodeDenied)
	k.ask(t, "GET", "/v1/keys?prefix=ba", shopToken, "").wants(t, 403, api.CodeDenied)
	var page api.KeyPage
	if err := json.Unmarshal(k.ask(t, "GET", "/v1/keys?prefix=shop-", shopToken, "").body, &page); err != nil || len(page.Keys) != 2 {
		t.Errorf("the shop lists %+v, %v", page, err)
	}
}

func TestRequestID(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	for id, kept := range map[string]bool{"abc-1.2_3": true, "": false, "a b": false, "a/b": false, strings.Repeat("x", 65): false, `"`: false} {
		got := k.ask(t, "GET", "/livez", "", "", api.RequestIDHeader, id).header.Get(api.RequestIDHeader)
		if (got == id) != kept || got == "" {
			t.Errorf("request id %q became %q", id, got)
		}
	}
}

func TestNoSuchRoute(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	for _, path := range []string{
		"/", "/v1", "/v1/", "/v1/keys/", "/v1/keys//wrap", "/v1//keys", "/v1/keys/a/../b", "/v1/keys/./a", "//v1/keys", "/v1/keys/a/wrap/",
		"/v1/database", "/metrics", "/ui/", "/v1/groups/default/nothing", "/livez/", "/v1/databases/erp/keys/", "/v1/databases/erp/keys/a/b",
		"/v1/databases/erp/keys/../keys/a", "/v1/databases/erp/keys/a/..", "/v1%2Fkeys",
	} {
		a := k.ask(t, "GET", path, adminToken, "")
		if e := a.wants(t, 404, api.CodeNotFound); e.Message != "no such route" {
			t.Errorf("GET %s: %s", path, a.body)
		}
	}
	for path, want := range map[string]string{"/v1/keys": "GET, POST", "/v1/keys/a": "DELETE, GET, PATCH", "/v1/keys/a/wrap": "POST", "/livez": "GET"} {
		a := k.ask(t, "PUT", path, adminToken, "")
		a.wants(t, 405, api.CodeBadRequest)
		if got := a.header.Get("Allow"); got != want {
			t.Errorf("PUT %s allows %q, want %q", path, got, want)
		}
	}
	for _, path := range []string{"/v1/keys/a%2fb", "/v1/keys/%2e%2ex", "/v1/keys/a%00", "/v1/keys/%c3%a9/wrap", "/v1/keys/a%2f%2fb", "/v1/keys/%2e%2e", "/v1/databases/%2e%2e", "/v1/databases/a%2fb/keys"} {
		method := "GET"
		if strings.HasSuffix(path, "wrap") {
			method = "POST"
		}
		k.ask(t, method, path, adminToken, "").wants(t, 400, api.CodeBadRequest)
	}
	if a := k.ask(t, "HEAD", "/livez", "", ""); a.status != 200 || len(a.body) != 0 {
		t.Errorf("HEAD /livez: %d %q", a.status, a.body)
	}
}

// Another site's page cannot use the certificate that a browser sends by itself.
func TestCrossOrigin(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	k.ask(t, "POST", "/v1/keys", adminToken, `{"name":"a"}`, "Sec-Fetch-Site", "cross-site").wants(t, 403, api.CodeDenied)
	k.ask(t, "POST", "/v1/keys", adminToken, `{"name":"a"}`, "Origin", "https://evil.example").wants(t, 403, api.CodeDenied)
	if r := k.audit.take(); len(r) != 2 || r[0].Outcome != "denied" {
		t.Errorf("audited %+v", r)
	}
}

// Every code has its status, and errors keep their fields on the way.
func TestErrorsKeepTheirFields(t *testing.T) {
	var now *api.Error
	service := &apitest.Memory{Fail: func(context.Context, string, string) error { return now }}
	k := start(t, service, nil)
	c := k.client(t, nil)
	want := map[api.Code]int{
		api.CodeBadRequest: 400, api.CodeUnauthenticated: 401, api.CodeDenied: 403, api.CodeNotFound: 404, api.CodeExists: 409,
		api.CodeState: 409, api.CodeWrongKey: 422, api.CodeCorrupt: 422, api.CodeTooLarge: 413, api.CodeRateLimited: 429,
		api.CodeInsufficientCopies: 503, api.CodeGroupLost: 503, api.CodeMemberFailed: 502, api.CodeDeadline: 504,
		api.CodeUnavailable: 503, api.CodeInternal: 500,
	}
	if len(want) != len(api.Codes()) {
		t.Fatalf("%d codes are tested of %d", len(want), len(api.Codes()))
	}
	for _, code := range api.Codes() {
		now = api.NewError(code, "as the operator reads it", nil)
		now.CKR, now.Member, now.Hint, now.RetryAfterMS = "CKR_DEVICE_ERROR", "hsm-b", "do this", 1
		if got := httpapi.StatusOf(code); got != want[code] {
			t.Errorf("%s has status %d, want %d", code, got, want[code])
		}
		a := k.ask(t, "POST", "/v1/keys", adminToken, `{"name":"shop"}`)
		a.wants(t, want[code], code)
		if a.header.Get("Retry-After") != "1" {
			t.Errorf("%s: Retry-After is %q", code, a.header.Get("Retry-After"))
		}
		_, err := c.CreateMasterKey(t.Context(), "shop", api.KeyOptions{})
		var got *api.Error
		if !errors.As(err, &got) {
			t.Fatalf("%s became %v", code, err)
		}
		if got.RequestID == "" {
			t.Errorf("%s is without request id", code)
		}
		got.RequestID = ""
		if *got != *now {
			t.Errorf("%s became %+v, want %+v", code, *got, *now)
		}
	}
	if now.RequestID != "" {
		t.Error("the service's own error was changed")
	}
}

// A fault of kmsd tells the log what it was, and the client where to look.
func TestFaultsOfKmsd(t *testing.T) {
	var log strings.Builder
	boom := func() error { return errors.New("the disk is on fire") }
	service := &apitest.Memory{Fail: func(_ context.Context, method, _ string) error {
		if method == "Key" {
			return boom()
		}
		panic("a bug")
	}}
	k := start(t, service, func(c *httpapi.Config) { c.Logger = hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Error}) })
	for _, r := range []request{{method: "GET", path: "/v1/keys/shop"}, {method: "POST", path: "/v1/keys/shop/rotate"}} {
		e := k.ask(t, r.method, r.path, adminToken, "", api.RequestIDHeader, "id-of-"+r.method).wants(t, 500, api.CodeInternal)
		if e.Message != "kmsd has failed" || e.Hint != "its log says more under this request_id" {
			t.Errorf("%s %s: %+v", r.method, r.path, e)
		}
	}
	for _, text := range []string{"the disk is on fire", "id-of-GET", "panic in action rotate", "id-of-POST"} {
		if !strings.Contains(log.String(), text) {
			t.Errorf("the log does not say %q:\n%s", text, &log)
		}
	}
	if r := k.audit.take(); len(r) != 2 || r[0].Outcome != "internal" || r[1].Outcome != "internal" {
		t.Errorf("audited %+v", r)
	}
}

// The time of a request is the server's, or less if the client says so.
func TestDeadlineOfARequest(t *testing.T) {
	var left time.Duration
	service := &apitest.Memory{Fail: func(ctx context.Context, _, _ string) error {
		end, ok := ctx.Deadline()
		if !ok {
			return errors.New("no deadline")
		}
		left = time.Until(end)
		return nil
	}}
	k := start(t, service, func(c *httpapi.Config) { c.Limits.Timeout = time.Hour })
	for header, most := range map[string]time.Duration{"": time.Hour, "20m": 20 * time.Minute, "10h": time.Hour} {
		k.ask(t, "GET", "/v1/keys", adminToken, "", api.TimeoutHeader, header)
		if left > most || left < most-10*time.Minute {
			t.Errorf("with timeout %q %v are left, want %v", header, left, most)
		}
	}
	for _, bad := range []string{"5", "-1s", "0s", "soon"} {
		k.ask(t, "GET", "/v1/keys", adminToken, "", api.TimeoutHeader, bad).wants(t, 400, api.CodeBadRequest)
	}
	e := k.ask(t, "GET", "/v1/keys", adminToken, "", api.TimeoutHeader, "1ns").wants(t, 504, api.CodeDeadline)
	if !e.Retryable {
		t.Errorf("%+v", e)
	}
}

func TestRateLimit(t *testing.T) {
	k := start(t, new(apitest.Memory), func(c *httpapi.Config) { c.Limits.Rate, c.Limits.Burst = 0.001, 2 })
	for range 2 {
		if a := k.ask(t, "GET", "/v1/keys", adminToken, ""); a.status != 200 {
			t.Fatalf("%d %s", a.status, a.body)
		}
	}
	a := k.ask(t, "GET", "/v1/keys", adminToken, "")
	e := a.wants(t, 429, api.CodeRateLimited)
	if !e.Retryable || e.RetryAfterMS < 900_000 || a.header.Get("Retry-After") == "" || !strings.Contains(e.Message, "admin") {
		t.Errorf("%+v", e)
	}
	k.ask(t, "GET", "/v1/keys", nobodyToken, "").wants(t, 403, api.CodeDenied) // another bucket
}

// Those who cannot say who they are cannot fill the disk with their attempts, and none
// of these is forgotten.
func TestAFloodOfStrangersIsCounted(t *testing.T) {
	k := start(t, new(apitest.Memory), func(c *httpapi.Config) { c.Limits.Strangers = 2 })
	began := time.Now()
	for range 2 {
		k.ask(t, "GET", "/v1/keys", "wrong", "").wants(t, 401, api.CodeUnauthenticated)
	}
	const n = 50 // more than one a second
	refused := 0
	for range n {
		if a := k.ask(t, "GET", "/v1/keys", "", ""); a.status != 401 {
			refused++
			if e := a.wants(t, 429, api.CodeRateLimited); e.RetryAfterMS == 0 {
				t.Errorf("%+v", e)
			}
		}
	}
	if most := 1 + int(time.Since(began).Seconds()); n-refused > most {
		t.Errorf("%d requests were answered in %v, want one a second", n-refused, time.Since(began))
	}
	if a := k.ask(t, "GET", "/v1/keys", adminToken, ""); a.status != 200 {
		t.Errorf("the admin gets %d", a.status)
	}
	k.server.Handler.(*httpapi.Handler).Flush()
	alone, counted := 0, 0
	for _, r := range k.audit.take() {
		if r.Suppressed == 0 {
			alone++
			continue
		}
		counted += r.Suppressed // in more than one record when all this takes long
		if r.Outcome != "unauthenticated" || r.Time.IsZero() {
			t.Errorf("recorded %+v", r)
		}
	}
	if counted != refused || alone != 2+n-refused+1 {
		t.Errorf("%d records, and others that tell of %d, after %d of %d requests were refused", alone, counted, refused, n)
	}
}

// Before it is clear who asks, nothing of a request is worth an answer of its own.
func TestStrangersLearnNothing(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	k.ask(t, "GET", "/v1/keys", "", "", api.TimeoutHeader, "soon").wants(t, 401, api.CodeUnauthenticated)
	k.ask(t, "GET", "/v1/keys", adminToken, "", api.TimeoutHeader, "soon").wants(t, 400, api.CodeBadRequest)
	k.ask(t, "GET", "/v1/keys/%00?x=1", "", "").wants(t, 401, api.CodeUnauthenticated)
}

func TestInFlightLimit(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	service := &apitest.Memory{Fail: func(context.Context, string, string) error {
		entered <- struct{}{}
		<-leave
		return nil
	}}
	k := start(t, service, func(c *httpapi.Config) { c.Limits.InFlight = 1 })
	done := make(chan error, 1)
	c := k.client(t, nil)
	go func() { _, err := c.Keys(t.Context(), api.ListOptions{}); done <- err }()
	<-entered
	e := k.ask(t, "GET", "/livez", "", "").wants(t, 429, api.CodeRateLimited)
	if e.RetryAfterMS == 0 {
		t.Errorf("%+v", e)
	}
	close(leave)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// What an answer holds is for its reader alone.
func TestAnswersAreNotStored(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	a := k.ask(t, "GET", "/v1/random", adminToken, "")
	for name, want := range map[string]string{
		"Cache-Control": "no-store", "Content-Type": "application/json", "X-Content-Type-Options": "nosniff",
		"Content-Length": fmt.Sprint(len(a.body)),
	} {
		if got := a.header.Get(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if _, err := httpapi.New(httpapi.Config{Service: new(apitest.Memory)}); err == nil {
		t.Error("an API without authenticator and auditor was made")
	}
}
