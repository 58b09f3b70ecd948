package httpapi_test

import (
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"kmsd/cmd/kmsd/internal/httpapi"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

var update = flag.Bool("update", false, "write testdata/openapi.json anew")

// document is the part of an OpenAPI document that the tests look at.
type document struct {
	OpenAPI    string                          `json:"openapi"`
	Paths      map[string]map[string]operation `json:"paths"`
	Components struct {
		Schemas   map[string]schema `json:"schemas"`
		Responses map[string]response
	} `json:"components"`
}

type operation struct {
	OperationID string              `json:"operationId"`
	Summary     string              `json:"summary"`
	Security    *[]any              `json:"security"`
	Parameters  []parameter         `json:"parameters"`
	RequestBody *response           `json:"requestBody"`
	Responses   map[string]response `json:"responses"`
}

type parameter struct {
	Name string `json:"name"`
	In   string `json:"in"`
}

type response struct {
	Ref     string `json:"$ref"`
	Content map[string]struct {
		Schema schema `json:"schema"`
	} `json:"content"`
}

type schema struct {
	Ref                  string            `json:"$ref"`
	Type                 any               `json:"type"` // a name or a list of names
	Format               string            `json:"format"`
	ContentEncoding      string            `json:"contentEncoding"`
	Enum                 []string          `json:"enum"`
	Items                *schema           `json:"items"`
	Properties           map[string]schema `json:"properties"`
	Required             []string          `json:"required"`
	AdditionalProperties any               `json:"additionalProperties"` // false, or the schema of all values
}

func readDocument(t *testing.T, k *kmsd) document {
	t.Helper()
	a := k.ask(t, "GET", "/openapi.json", "", "")
	var d document
	if err := json.Unmarshal(a.body, &d); err != nil || a.status != 200 || d.OpenAPI != "3.1.0" {
		t.Fatalf("%d %v: %.200s", a.status, err, a.body)
	}
	return d
}

// A change of the API is a change of a file that a reviewer sees.
func TestDocumentIsTheOneReviewed(t *testing.T) {
	k := start(t, new(apitest.Memory), nil)
	var got json.RawMessage = k.ask(t, "GET", "/openapi.json", "", "").body
	got, err := json.MarshalIndent(got, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	const path = "testdata/openapi.json"
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("the API has changed; if that is meant, run go test -run %s -update and look at the difference", t.Name())
	}
}

// Every route is in the document, and the document has nothing else.
func TestDocumentMatchesRoutes(t *testing.T) {
	d := readDocument(t, start(t, new(apitest.Memory), nil))
	described := make(map[string]operation)
	ids := make(map[string]bool)
	for path, methods := range d.Paths {
		for method, op := range methods {
			described[strings.ToUpper(method)+" "+path] = op
			if ids[op.OperationID] || op.OperationID == "" || op.Summary == "" {
				t.Errorf("%s %s has the id %q and the summary %q", method, path, op.OperationID, op.Summary)
			}
			ids[op.OperationID] = true
			for _, segment := range strings.Split(path, "/") {
				name, is := strings.CutPrefix(segment, "{")
				if is && !slices.Contains(op.Parameters, parameter{strings.TrimSuffix(name, "}"), "path"}) {
					t.Errorf("%s %s does not describe %s", method, path, segment)
				}
			}
		}
	}
	take := func(route string) operation {
		op, ok := described[route]
		if !ok {
			t.Errorf("%s is not described", route)
		}
		delete(described, route)
		return op
	}
	for _, row := range httpapi.Rows() {
		if op := take(row.Method + " " + row.Pattern); op.Security != nil {
			t.Errorf("%s %s is said to need no principal", row.Method, row.Pattern)
		}
	}
	for _, pattern := range httpapi.PublicPatterns() {
		if op := take("GET " + pattern); op.Security == nil {
			t.Errorf("GET %s is said to need a principal", pattern)
		}
	}
	for route := range described {
		t.Errorf("%s is described and does not exist", route)
	}
}

// What goes over the wire is what the document says: bodies that work, and every
// answer, also of an error and a batch.
func TestTrafficFitsDocument(t *testing.T) {
	service := new(apitest.Memory)
	k := start(t, service, nil)
	d := readDocument(t, k)
	requests := workingRequests(t, service)
	requests = append(requests,
		request{method: "POST", path: "/v1/keys/shop/wrap", body: `{"items":[{"plaintext":"cA==","aad":"cA=="},{}]}`, row: httpapi.Row{Pattern: "/v1/keys/{name}/wrap"}},
		request{method: "POST", path: "/v1/keys/shop/datakey", body: `{"items":[{"bytes":16,"plaintext":false}]}`, row: httpapi.Row{Pattern: "/v1/keys/{name}/datakey"}},
		request{method: "GET", path: "/livez", row: httpapi.Row{Pattern: "/livez"}},
		request{method: "GET", path: "/readyz", row: httpapi.Row{Pattern: "/readyz"}},
	)
	for _, r := range requests {
		if r.path == "/v1/events" {
			continue
		}
		op := d.Paths[r.row.Pattern][strings.ToLower(r.method)]
		if r.body != "" {
			if op.RequestBody == nil {
				t.Fatalf("%s %s has no body in the document", r.method, r.path)
			}
			d.check(t, r.method+" "+r.path+" request", op.RequestBody.Content["application/json"].Schema, []byte(r.body))
		}
		a := k.ask(t, r.method, r.path, adminToken, r.body)
		if a.status != 200 {
			t.Errorf("%s %s: %d %s", r.method, r.path, a.status, a.body)
		}
		if _, stream := op.Responses["200"].Content["application/octet-stream"]; stream {
			continue
		}
		d.check(t, r.method+" "+r.path+" answer", op.Responses["200"].Content["application/json"].Schema, a.body)
	}
	e := k.ask(t, "GET", "/v1/keys", "", "")
	d.check(t, "an error", d.Components.Responses["error"].Content["application/json"].Schema, e.body)
}

// check holds a JSON text against a schema.
func (d document) check(t *testing.T, where string, s schema, text []byte) {
	t.Helper()
	var v any
	if err := json.Unmarshal(text, &v); err != nil {
		t.Errorf("%s is no JSON: %v", where, err)
		return
	}
	for _, fault := range d.faults("", s, v) {
		t.Errorf("%s: %s", where, fault)
	}
}

// faults are the ways in which a value does not fit a schema.
func (d document) faults(path string, s schema, v any) []string {
	if name, ok := strings.CutPrefix(s.Ref, "#/components/schemas/"); ok {
		named, ok := d.Components.Schemas[name]
		if !ok {
			return []string{path + " has the unknown schema " + name}
		}
		s = named
	}
	types := fmt.Sprint(s.Type)
	wrong := []string{fmt.Sprintf("%s is %v, want %s", path, v, types)}
	switch v := v.(type) {
	case nil:
		if !strings.Contains(types, "null") {
			return wrong
		}
	case bool:
		if types != "boolean" {
			return wrong
		}
	case float64:
		if types != "number" && (types != "integer" || v != float64(int64(v))) {
			return wrong
		}
	case string:
		if !strings.Contains(types, "string") || !s.fitsText(v) {
			return wrong
		}
	case []any:
		if types != "array" {
			return wrong
		}
		var faults []string
		for i, item := range v {
			faults = append(faults, d.faults(fmt.Sprintf("%s[%d]", path, i), *s.Items, item)...)
		}
		return faults
	case map[string]any:
		if types != "object" {
			return wrong
		}
		return d.objectFaults(path, s, v)
	}
	return nil
}

func (d document) objectFaults(path string, s schema, v map[string]any) []string {
	var faults []string
	for _, name := range s.Required {
		if _, ok := v[name]; !ok {
			faults = append(faults, path+"."+name+" is missing")
		}
	}
	for name, member := range v {
		property, ok := s.Properties[name]
		if _, open := s.AdditionalProperties.(map[string]any); open {
			if _, text := member.(string); !text {
				faults = append(faults, path+"."+name+" is not text")
			}
			continue
		}
		if !ok {
			faults = append(faults, path+"."+name+" is not described")
			continue
		}
		faults = append(faults, d.faults(path+"."+name, property, member)...)
	}
	return faults
}

func (s schema) fitsText(v string) bool {
	var err error
	switch {
	case s.ContentEncoding == "base64":
		_, err = base64.StdEncoding.DecodeString(v)
	case s.Format == "date-time":
		_, err = time.Parse(time.RFC3339, v)
	}
	return err == nil && (len(s.Enum) == 0 || slices.Contains(s.Enum, v))
}

// The sets in the document are those of the Go API.
func TestDocumentHasEveryCode(t *testing.T) {
	d := readDocument(t, start(t, new(apitest.Memory), nil))
	var want []string
	for _, c := range api.Codes() {
		want = append(want, string(c))
	}
	if got := d.Components.Schemas["Error"].Properties["code"].Enum; !slices.Equal(got, want) {
		t.Errorf("codes %v, want %v", got, want)
	}
	for _, name := range []string{"CreateBody", "ItemsBody", "DataKeysBody", "SignRequest", "VerifyRequest", "DecryptRequest", "MACRequest", "KeyUpdate", "MemberSpec", "RoleBody", "SyncOptions", "RotateOptions", "CreateDatabaseBody", "NamedKeyPut", "RekeyOptions", "BackupBody"} {
		if s := d.Components.Schemas[name]; s.AdditionalProperties != false {
			t.Errorf("schema %s allows unknown fields, the door does not", name)
		}
	}
}
