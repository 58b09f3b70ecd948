package httpapi_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

// oaep encrypts for an RSA key.
func oaep(t testing.TB, service *apitest.Memory, name string) []byte {
	t.Helper()
	key, err := service.Key(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.ParsePKIXPublicKey(key.Versions[0].PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public.(*rsa.PublicKey), []byte("p"), nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestBadBodies(t *testing.T) {
	service := new(apitest.Memory)
	k := start(t, service, nil)
	workingRequests(t, service)
	for _, c := range []struct{ name, path, body, message string }{
		{"nothing", "/v1/keys/shop/wrap", ``, "the body is empty, want a JSON object"},
		{"spaces", "/v1/keys/shop/wrap", `  `, "the body is empty, want a JSON object"},
		{"not JSON", "/v1/keys/shop/wrap", `plaintext=x`, "the body is not JSON: byte 1 is wrong"},
		{"cut JSON", "/v1/keys/shop/wrap", `{"plaintext":"cA=="`, "the body is not JSON: it ends too early"},
		{"a list", "/v1/keys/shop/wrap", `[]`, "the body is not a JSON object"},
		{"a string", "/v1/keys/shop/wrap", `"secret"`, "the body is not a JSON object"},
		{"more than one value", "/v1/keys/shop/wrap", `{"plaintext":"cA=="}{}`, "the body goes on after its JSON object"},
		{"junk after it", "/v1/keys/shop/wrap", `{"plaintext":"cA=="} x`, "the body goes on after its JSON object"},
		{"an unknown field", "/v1/keys/shop/wrap", `{"plaintext":"cA==","add":"eA=="}`, `unknown field "add"`},
		{"a wrong type", "/v1/keys/shop/wrap", `{"plaintext":5}`, `field "plaintext" wants a base64 string`},
		{"no base64", "/v1/keys/shop/wrap", `{"plaintext":"secret!"}`, "a field is not standard base64: its character 6 is wrong"},
		{"URL-safe base64", "/v1/keys/shop/wrap", `{"plaintext":"-_-_"}`, "a field is not standard base64: its character 0 is wrong"},
		{"no plaintext", "/v1/keys/shop/wrap", `{}`, `field "plaintext" is missing or empty`},
		{"the field of another route", "/v1/keys/shop/wrap", `{"wrapped":"cA=="}`, `wrap takes field "plaintext", not "wrapped"`},
		{"the field of wrap", "/v1/keys/shop/unwrap", `{"plaintext":"cA=="}`, `unwrap takes field "wrapped", not "plaintext"`},
		{"no envelope", "/v1/keys/shop/rewrap", `{"aad":"cA=="}`, `field "wrapped" is missing or empty`},
		{"items beside a single one", "/v1/keys/shop/wrap", `{"plaintext":"cA==","items":[]}`, "the body has items and the fields of a single one; send either"},
		{"items beside an aad", "/v1/keys/shop/unwrap", `{"aad":"cA==","items":[{}]}`, "the body has items and the fields of a single one; send either"},
		{"items beside bytes", "/v1/keys/shop/datakey", `{"bytes":5,"items":[{}]}`, "the body has items and the fields of a single one; send either"},
		{"no items", "/v1/keys/shop/wrap", `{"items":[]}`, "items is empty"},
		{"a foreign field in an item", "/v1/keys/shop/wrap", `{"items":[{"plaintext":"cA=="},{"wrapped":"cA=="}]}`, `item 1: wrap takes field "plaintext", not "wrapped"`},
		{"an unknown field in an item", "/v1/keys/shop/wrap", `{"items":[{"plain":"cA=="}]}`, `unknown field "plain"`},
		{"items of a wrong type", "/v1/keys/shop/wrap", `{"items":{}}`, `field "items" wants a list`},
		{"a fraction of bytes", "/v1/keys/shop/datakey", `{"bytes":1.5}`, `field "bytes" wants a whole number`},
		{"a wrong truth", "/v1/keys/shop/datakey", `{"plaintext":"no"}`, `field "plaintext" wants true or false`},
		{"a wrong duration", "/v1/keys", `{"name":"x","rotation_period":"a month"}`, "a field has a value of the wrong form, for example a duration that is not like 720h"},
		{"no name", "/v1/keys", `{}`, "the key has no name"},
		{"a body where none is wanted", "/v1/keys/shop/rotate", `{"force":true}`, `unknown field "force"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			if e := k.ask(t, "POST", c.path, adminToken, c.body).wants(t, 400, api.CodeBadRequest); e.Message != c.message {
				t.Errorf("got  %s\nwant %s", e.Message, c.message)
			}
		})
	}
	if a := k.ask(t, "POST", "/v1/keys/shop/rotate", adminToken, "{}"); a.status != 200 {
		t.Errorf("an empty object where no body is wanted: %d %s", a.status, a.body)
	}
}

func TestBadQueries(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	k.ask(t, "POST", "/v1/keys", adminToken, `{"name":"shop"}`)
	for query, message := range map[string]string{
		"GET /v1/keys?limit=0":                  `parameter "limit" wants a number from 1 to 1000`,
		"GET /v1/keys?limit=1001":               `parameter "limit" wants a number from 1 to 1000`,
		"GET /v1/keys?limit=x":                  `parameter "limit" wants a number from 1 to 1000`,
		"GET /v1/keys?prefx=a":                  `unknown parameter "prefx"`,
		"GET /v1/keys?prefix=a&prefix=b":        `parameter "prefix" is given more than once`,
		"GET /v1/keys?prefix=%zz":               `the query is not well formed`,
		"GET /v1/random?bytes=65537":            `parameter "bytes" wants a number from 1 to 65536`,
		"DELETE /v1/keys/shop?window=-1h":       `parameter "window" wants a duration like 720h`,
		"DELETE /v1/keys/shop?window=5":         `parameter "window" wants a duration like 720h`,
		"DELETE /v1/keys/shop?windw=720h":       `unknown parameter "windw"`,
		"POST /v1/keys/shop/rotate?window=720h": `unknown parameter "window"`,
	} {
		method, path, _ := strings.Cut(query, " ")
		if e := k.ask(t, method, path, adminToken, "").wants(t, 400, api.CodeBadRequest); e.Message != message {
			t.Errorf("%s: %s, want %s", query, e.Message, message)
		}
	}
	var key api.Key
	if err := json.Unmarshal(k.ask(t, "GET", "/v1/keys/shop", adminToken, "").body, &key); err != nil || key.State != api.StateEnabled {
		t.Errorf("a refused request has changed the key: %+v, %v", key, err)
	}
}

func TestTooLarge(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	// A body that is announced too long is refused before it is sent: who sends it all the
	// same may see the end of the connection before the answer.
	k.http.Transport.(*http.Transport).ExpectContinueTimeout = patience
	k.ask(t, "POST", "/v1/keys", adminToken, `{"name":"shop"}`)
	for path, size := range map[string]int{
		"/v1/keys": 64 << 10, "/v1/keys/shop/rotate": 64 << 10, "/v1/keys/shop/sign": 64 << 10, "/v1/keys/shop/mac": 128 << 10, "/v1/keys/shop/wrap": 8 << 20,
	} {
		body := strings.Repeat(" ", size) + "{}"
		k.ask(t, "POST", path, adminToken, body, "Expect", "100-continue").wants(t, 413, api.CodeTooLarge)
		// A body that does not say how long it is.
		req := httptest.NewRequestWithContext(t.Context(), "POST", k.addr+path, struct{ *strings.Reader }{strings.NewReader(body)})
		req.RequestURI = ""
		req.ContentLength = -1
		req.Header.Set("Authorization", "Bearer "+adminToken)
		resp, err := k.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 413 {
			t.Errorf("%s in chunks: %d", path, resp.StatusCode)
		}
	}
	items := strings.TrimSuffix(strings.Repeat(`{"plaintext":"cA=="},`, api.MaxItems+1), ",")
	k.ask(t, "POST", "/v1/keys/shop/wrap", adminToken, `{"items":[`+items+`]}`).wants(t, 413, api.CodeTooLarge)
}

// A batch has status 200 and an error for each item that failed.
func TestBatchOnTheWire(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	k.ask(t, "POST", "/v1/keys", adminToken, `{"name":"shop"}`)
	k.audit.take()
	a := k.ask(t, "POST", "/v1/keys/shop/wrap", adminToken, `{"items":[{"plaintext":"cA=="},{}]}`)
	var body map[string][]map[string]json.RawMessage
	if err := json.Unmarshal(a.body, &body); err != nil || a.status != 200 || len(body) != 1 || len(body["items"]) != 2 {
		t.Fatalf("%d %s %v", a.status, a.body, err)
	}
	if good := body["items"][0]; good["wrapped"] == nil || good["version"] == nil || good["error"] != nil {
		t.Errorf("the good item is %s", good)
	}
	if bad := body["items"][1]; len(bad) != 1 || !bytes.Contains(bad["error"], []byte(`"code":"bad_request"`)) {
		t.Errorf("the bad item is %s", bad)
	}
	if r := k.audit.take(); len(r) != 1 || r[0].Items != 2 || r[0].Failed != 1 || r[0].Outcome != "ok" {
		t.Errorf("audited %+v", r)
	}
}

// FuzzBodies sends any body to any route: the answer is always JSON, never a fault
// of kmsd, and what is refused leaves no trace of its values in the message.
func FuzzBodies(f *testing.F) {
	rows := httpapi.Rows()
	for i := range rows {
		for _, body := range []string{``, `{}`, `{"name":"x"}`, `{"plaintext":"cA==","aad":null}`, `{"items":[{"wrapped":"AAAA"}]}`, `{"items":null}`, `{"bytes":-1}`, `{"digest":"","version":9}`, `[[[[`, `{"a":1e999}`} {
			f.Add(uint8(i), []byte(body), "x=1")
		}
	}
	service := new(apitest.Memory)
	for name, kind := range map[string]string{"aes": "aes-256", "ec": "ec-p256", "hmac": "hmac-sha256"} {
		if _, err := service.CreateMasterKey(f.Context(), name, api.KeyOptions{Type: kind}); err != nil {
			f.Fatal(err)
		}
	}
	if _, err := service.CreateDatabase(f.Context(), "erp", api.DatabaseOptions{}); err != nil {
		f.Fatal(err)
	}
	h, err := httpapi.New(httpapi.Config{Service: service, Auth: tokens{}, Audit: new(auditLog)})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, route uint8, body []byte, query string) {
		row := rows[int(route)%len(rows)]
		if row.Pattern == "/v1/events" || row.Pattern == "/v1/backup" {
			return // what is no JSON
		}
		for _, name := range []string{"aes", "ec", "hmac"} {
			r := httptest.NewRequestWithContext(t.Context(), row.Method, "/", bytes.NewReader(body))
			r.URL.Path = strings.NewReplacer("{name}", name, "{group}", "default", "{member}", "hsm-a", "{db}", "erp", "{key}", "1", "{id}", "job").Replace(row.Pattern)
			r.URL.RawQuery = query
			r.Header.Set("Authorization", "Bearer "+adminToken)
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code == http.StatusInternalServerError || !json.Valid(w.Body.Bytes()) {
				t.Errorf("%s %s with %q: %d %s", row.Method, r.URL, body, w.Code, w.Body)
			}
		}
	})
}
