package httpapi_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

// The client over TLS keeps the promises of the databases behind it.
func TestDatabasesOverTLS(t *testing.T) {
	open := func(t *testing.T) apitest.DatabaseService {
		return start(t, &apitest.Memory{Formats: map[string]string{apitest.MariaDB: api.FormatMariaDB}}, nil).client(t, nil)
	}
	apitest.RunDatabases(t, apitest.Plainly, open)
	apitest.RunRekeys(t, apitest.Plainly, open)
}

// erp starts a kmsd with the database erp.
func erp(t *testing.T) *kmsd {
	t.Helper()
	service := new(apitest.Memory)
	if _, err := service.CreateDatabase(t.Context(), "erp", api.DatabaseOptions{}); err != nil {
		t.Fatal(err)
	}
	return start(t, service, nil)
}

// An ID is one segment of the path that is decoded once, and nothing else is done to it.
func TestAnIDIsOpaque(t *testing.T) {
	k := erp(t)
	for escaped, id := range map[string]string{
		"1":                          "1",
		".":                          "", // a step in a path, for everybody on the way
		"..":                         "",
		"%2E":                        ".",
		"%2e%2E":                     "..",
		"%2F":                        "/",
		"a%2Fb":                      "a/b",
		"%2Fa%2F%2F":                 "/a//",
		"..%2F..%2F1":                "../../1",
		"%2E%2E%2Frotate":            "../rotate",
		"%00":                        "\x00",
		"%FF%FE":                     "\xff\xfe",
		"%252F":                      "%2F",
		"%25":                        "%",
		"a+b":                        "a+b",
		"a%20b":                      "a b",
		"a%3Fversion=1":              "a?version=1",
		"%23":                        "#",
		"a;b=c,d&e=f@g:h$!*'()~":     "a;b=c,d&e=f@g:h$!*'()~",
		"%C3%A9":                     "é",
		"rotate":                     "rotate",
		"metadata":                   "metadata",
		strings.Repeat("%2F", 255):   strings.Repeat("/", 255),
		strings.Repeat("x", 256):     "",
		"INNODB_KEY-7f%2Flong%3D%3D": "INNODB_KEY-7f/long==",
	} {
		k.audit.take()
		a := k.ask(t, "PUT", "/v1/databases/erp/keys/"+escaped, adminToken, "")
		got := k.audit.take()
		if id == "" {
			if a.status == 200 {
				t.Errorf("%s: %d %s", escaped, a.status, a.body)
			}
			continue
		}
		if a.status != 200 || len(got) != 1 || got[0].NamedKey != id {
			t.Errorf("%s: %d %s, recorded %+v", escaped, a.status, a.body, got)
			continue
		}
		found, err := k.service.DescribeNamedKey(t.Context(), "erp", id)
		if err != nil || found.Version != 1 {
			t.Errorf("%s: found %+v, %v", escaped, found, err)
		}
		for _, below := range []string{"/rotate", "/metadata"} {
			method := map[string]string{"/rotate": "POST", "/metadata": "GET"}[below]
			if a := k.ask(t, method, "/v1/databases/erp/keys/"+escaped+below, adminToken, ""); a.status != 200 {
				t.Errorf("%s%s: %d %s", escaped, below, a.status, a.body)
			}
		}
	}
}

// A path whose bytes are not encoded as they should be could be read as another one.
func TestAPathIsEncodedAsItShouldBe(t *testing.T) {
	h, err := httpapi.New(httpapi.Config{Service: new(apitest.Memory), Auth: tokens{}, Audit: new(auditLog)})
	if err != nil {
		t.Fatal(err)
	}
	for _, raw := range []string{`/v1/databases/erp/keys/a"%2Fb`, "/v1/databases/erp/keys/\xff%2Frotate", "/v1/keys/é"} {
		r := httptest.NewRequestWithContext(t.Context(), "GET", "/", nil)
		if r.URL, err = url.ParseRequestURI(raw); err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != 400 || !strings.Contains(w.Body.String(), "the path has bytes that must be percent-encoded") {
			t.Errorf("%s: %d %s", raw, w.Code, w.Body)
		}
	}
}

// FuzzIDs carries any ID from the client to the service and back.
func FuzzIDs(f *testing.F) {
	for _, id := range []string{"1", ".", "..", "/", "a/b", "../x", "\x00", "\xff", "%2F", "?", "#", "é", " ", "+", "rotate", strings.Repeat("/", 255), strings.Repeat("x", 256), ""} {
		f.Add(id)
	}
	service := new(apitest.Memory)
	if _, err := service.CreateDatabase(f.Context(), "erp", api.DatabaseOptions{}); err != nil {
		f.Fatal(err)
	}
	k := start(f, service, nil)
	c := k.client(f, nil)
	f.Fuzz(func(t *testing.T, id string) {
		k.audit.take()
		want := []byte("plaintext of " + id)
		_, err := c.PutNamedKey(t.Context(), "erp", id, api.NamedKeyPut{Plaintext: want})
		if valid := api.CheckNamedKeyID(id) == nil; (err == nil) != valid {
			t.Fatalf("putting %q: %v", id, err)
		} else if !valid {
			return
		}
		got, err := c.NamedKey(t.Context(), "erp", id, 0)
		bytesOf := got.Raw
		if bytesOf == nil {
			bytesOf = []byte(got.ID)
		}
		if err != nil || !bytes.Equal(got.Plaintext, want) || string(bytesOf) != id {
			t.Errorf("reading %q: %+v, %v", id, got, err)
		}
		for _, r := range k.audit.take() {
			if r.NamedKey != id || r.Database != "erp" {
				t.Errorf("%q is recorded as %q of %q", id, r.NamedKey, r.Database)
			}
		}
	})
}

// What is allowed on a database is allowed by its name, and each action by itself.
func TestPoliciesByDatabase(t *testing.T) {
	service := new(apitest.Memory)
	for _, name := range []string{"bank", "shop-1", "shop-2"} {
		if _, err := service.CreateDatabase(t.Context(), name, api.DatabaseOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	job, err := service.Rekey(t.Context(), "bank", api.RekeyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	own, err := service.Rekey(t.Context(), "shop-1", api.RekeyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	k := start(t, service, nil)
	for _, c := range []struct {
		method, path, body string
		allowed            bool
	}{
		{"GET", "/v1/databases/shop-1", "", true},
		{"GET", "/v1/databases/bank", "", false},
		{"GET", "/v1/databases/nobank", "", false},
		{"GET", "/v1/databases", "", false},
		{"GET", "/v1/databases?prefix=ba", "", false},
		{"PUT", "/v1/databases/shop-1/keys/1", "", true},
		{"GET", "/v1/databases/shop-1/keys/1", "", true},
		{"POST", "/v1/databases/shop-1/keys/1/rotate", "", true},
		{"GET", "/v1/databases/shop-1/keys/1/metadata", "", true},
		{"GET", "/v1/databases/shop-1/keys", "", true},
		{"DELETE", "/v1/databases/shop-1/keys/1", "", true},
		{"PUT", "/v1/databases/bank/keys/1", "", false},
		{"PUT", "/v1/databases/bank/keys/shop-1", "", false},
		{"GET", "/v1/databases/bank/keys/1", "", false},
		{"POST", "/v1/databases/bank/keys/1/rotate", "", false},
		{"GET", "/v1/databases/bank/keys/1/metadata", "", false},
		{"GET", "/v1/databases/bank/keys", "", false},
		{"DELETE", "/v1/databases/bank/keys/1", "", false},
		{"POST", "/v1/databases/bank/rekey", "", false},
		{"POST", "/v1/databases/shop-1/rekey", "", true},
		{"GET", "/v1/jobs/" + job.ID, "", false},
		{"GET", "/v1/jobs/" + own.ID, "", true},
		{"POST", "/v1/databases", `{"name":"shop-3"}`, true},
		{"POST", "/v1/databases", `{"name":"shop-4","key":"shop-3"}`, true},
		{"POST", "/v1/databases", `{"name":"shop-5","key":"bank"}`, false},
		{"POST", "/v1/databases", `{"name":"bank2"}`, false},
		{"POST", "/v1/backup", `{"recipients":["age1x"]}`, false},
	} {
		a := k.ask(t, c.method, c.path, shopToken, c.body)
		if (a.status == 200) != c.allowed || !c.allowed && a.status != 403 {
			t.Errorf("%s %s %s: %d %s", c.method, c.path, c.body, a.status, a.body)
		}
	}
	var page api.DatabasePage
	if err := json.Unmarshal(k.ask(t, "GET", "/v1/databases?prefix=shop-", shopToken, "").body, &page); err != nil || len(page.Databases) != 4 {
		t.Errorf("the shop lists %+v, %v", page, err)
	}
	for pattern, action := range map[string]string{
		"GET /v1/databases/{db}/keys/{key}":          "named-get",
		"PUT /v1/databases/{db}/keys/{key}":          "named-put",
		"POST /v1/databases/{db}/keys/{key}/rotate":  "named-put",
		"GET /v1/databases/{db}/keys/{key}/metadata": "named-list",
		"DELETE /v1/databases/{db}/keys/{key}":       "named-delete",
		"GET /v1/databases/{db}/keys":                "named-list",
		"POST /v1/databases/{db}/rekey":              "database-rekey",
		"GET /v1/jobs/{id}":                          "database-read",
		"GET /v1/databases/{db}":                     "database-read",
	} {
		method, path, _ := strings.Cut(pattern, " ")
		found := false
		for _, row := range httpapi.Rows() {
			found = found || row == httpapi.Row{Method: method, Pattern: path, Action: action}
		}
		if !found {
			t.Errorf("%s does not have the action %s", pattern, action)
		}
	}
}

// What was done is in the record, with the version and the job.
func TestRecordsTellWhatWasDoneToDatabases(t *testing.T) {
	k := erp(t)
	for _, c := range []struct {
		method, path, body string
		want               httpapi.Record
	}{
		{"PUT", "/v1/databases/erp/keys/k%2F1", "", httpapi.Record{Action: "named-put", Operation: "put", Database: "erp", NamedKey: "k/1", Version: 1, Outcome: "ok"}},
		{"POST", "/v1/databases/erp/keys/k%2F1/rotate", "", httpapi.Record{Action: "named-put", Operation: "rotate", Database: "erp", NamedKey: "k/1", Version: 2, Outcome: "ok"}},
		{"GET", "/v1/databases/erp/keys/k%2F1", "", httpapi.Record{Action: "named-get", Database: "erp", NamedKey: "k/1", Version: 2, Outcome: "ok"}},
		{"GET", "/v1/databases/erp/keys/k%2F1?version=1", "", httpapi.Record{Action: "named-get", Database: "erp", NamedKey: "k/1", Version: 1, Outcome: "ok"}},
		{"GET", "/v1/databases/erp/keys/k%2F1?version=9", "", httpapi.Record{Action: "named-get", Database: "erp", NamedKey: "k/1", Version: 9, Outcome: "not_found"}},
		{"GET", "/v1/databases/erp/keys/k%2F1/metadata", "", httpapi.Record{Action: "named-list", Operation: "describe", Database: "erp", NamedKey: "k/1", Version: 2, Outcome: "ok"}},
		{"GET", "/v1/databases/erp/keys", "", httpapi.Record{Action: "named-list", Operation: "list", Database: "erp", Outcome: "ok"}},
		{"DELETE", "/v1/databases/erp/keys/k%2F1", "", httpapi.Record{Action: "named-delete", Database: "erp", NamedKey: "k/1", Outcome: "ok"}},
		{"POST", "/v1/databases", `{"name":"crm","key":"shared","group":"default","allow_degraded":true}`, httpapi.Record{
			Action: "database-create", Database: "crm", Key: "shared", Group: "default", AllowDegraded: true, Outcome: "ok"}},
		{"POST", "/v1/databases/erp/rekey", `{"retire":"disable","allow_degraded":true}`, httpapi.Record{
			Action: "database-rekey", Operation: "disable", Database: "erp", AllowDegraded: true, Version: 2, Outcome: "ok"}},
		{"POST", "/v1/databases/erp/rekey", `{"retire":"secret"}`, httpapi.Record{Action: "database-rekey", Database: "erp", Outcome: "bad_request"}},
		{"POST", "/v1/keys/shared/rotate", "", httpapi.Record{Action: "rotate", Key: "shared", Version: 2, Outcome: "ok"}},
		{"POST", "/v1/keys/shared/disable?version=1", "", httpapi.Record{Action: "disable", Operation: "version", Key: "shared", Version: 1, Outcome: "ok"}},
		{"DELETE", "/v1/keys/shared?version=1&window=1h", "", httpapi.Record{Action: "destroy", Operation: "version", Key: "shared", Version: 1, Outcome: "ok"}},
		{"POST", "/v1/keys/shared/disable", "", httpapi.Record{Action: "disable", Key: "shared", Outcome: "ok"}},
	} {
		k.ask(t, c.method, c.path, adminToken, c.body)
		got := k.audit.take()[0]
		if c.want.Action == "database-rekey" && c.want.Outcome == "ok" {
			if got.Job == "" {
				t.Errorf("%s: the record names no job", c.path)
			}
			c.want.Job = got.Job
		}
		c.want.Time, c.want.RequestID, c.want.Principal, c.want.Remote, c.want.Duration = got.Time, got.RequestID, "admin", got.Remote, got.Duration
		if got != c.want {
			t.Errorf("%s %s %s: recorded %+v, want %+v", c.method, c.path, c.body, got, c.want)
		}
	}
}

var moment = regexp.MustCompile(`"20[0-9T:.-]+Z"`)

// What is answered is what clients read: a change of these bytes breaks them.
func TestAnswersAboutDataKeys(t *testing.T) {
	k := erp(t)
	for _, c := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"PUT", "/v1/databases/erp/keys/1", `{"plaintext":"MTIzNDU2Nzg5MDEyMzQ1Ng=="}`, 200,
			`{"database":"erp","id":"1","version":1,"newest":1,"created":NOW,"first":NOW,"master_version":1}`},
		{"GET", "/v1/databases/erp/keys/1", "", 200,
			`{"database":"erp","id":"1","version":1,"newest":1,"created":NOW,"first":NOW,"master_version":1,"plaintext":"MTIzNDU2Nzg5MDEyMzQ1Ng=="}`},
		{"PUT", "/v1/databases/erp/keys/%FF", `{"plaintext":"e30=","object":true}`, 200,
			"{\"database\":\"erp\",\"id\":\"\ufffd\",\"raw\":\"/w==\",\"version\":1,\"newest\":1,\"created\":NOW,\"first\":NOW,\"object\":true,\"master_version\":1}"},
		{"DELETE", "/v1/databases/erp/keys/%FF", "", 200, `{}`},
		{"GET", "/v1/databases/erp/keys?limit=1", "", 200,
			`{"keys":[{"database":"erp","id":"1","version":1,"newest":1,"created":NOW,"first":NOW,"master_version":1}],"next":"MQ"}`},
		{"GET", "/v1/databases/erp", "", 200,
			`{"name":"erp","key":"erp","version":1,"group":"default","created":NOW,"keys":2,"versions":2}`},
		{"PUT", "/v1/databases/erp/keys/1", `{"plaintext":""}`, 400, ""},
		{"PUT", "/v1/databases/erp/keys/1", `{"bytes":1025}`, 400, ""},
		{"PUT", "/v1/databases/erp/keys/1", `{"cas":0}`, 409, ""},
		{"PUT", "/v1/databases/erp/keys/1", `{"cas":5}`, 409, ""},
		{"GET", "/v1/databases/erp/keys/1?version=0", "", 400, ""},
		{"GET", "/v1/databases/erp/keys/1?describe=true", "", 400, ""},
		{"GET", "/v1/databases/erp/keys/%FF", "", 404, ""},
		{"GET", "/v1/databases/nothing/keys/1", "", 404, ""},
		{"GET", "/v1/jobs/nothing", "", 404, ""},
	} {
		a := k.ask(t, c.method, c.path, adminToken, c.body)
		got := strings.TrimSuffix(moment.ReplaceAllString(string(a.body), "NOW"), "\n")
		if a.status != c.status || c.want != "" && got != c.want {
			t.Errorf("%s %s:\ngot  %d %s\nwant %d %s", c.method, c.path, a.status, got, c.status, c.want)
		}
	}
	large := fmt.Sprintf(`{"plaintext":"%s"}`, strings.Repeat("AAAA", 64<<10/3))
	if a := k.ask(t, "PUT", "/v1/databases/erp/keys/large", adminToken, large); a.status != 200 {
		t.Errorf("a data key of 64 KiB: %d %s", a.status, a.body)
	}
	k.ask(t, "PUT", "/v1/databases/erp/keys/large", adminToken, large+strings.Repeat(" ", 64<<10)).wants(t, http.StatusRequestEntityTooLarge, api.CodeTooLarge)
}
