package vaultkv_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/vaultkv"
)

// record serves a request without a network.
func record(h *vaultkv.Handler, method, path, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "http://kms.example"+path, strings.NewReader(body))
	r.Header.Set("X-Vault-Token", token)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// FuzzRequest sends any first line. Whatever it is, it is written down once, and answered
// with what is certain or not at all.
func FuzzRequest(f *testing.F) {
	for _, line := range []string{
		"GET /v1/mariadb/data/1", "GET /v1/sys/mounts/team/db1/tune", "LIST /v1/team/db1/metadata/a/b", "GET /v1/team/db1/metadata/?list=true",
		"DELETE /v1/team/db1/data//..//", "POST /v1/team/db1/rotate/%2F?version=-1", "GET /v1//config", "PUT /v1/mariadb/data/%00?version=99999999999999999999",
		"GET /v1/sys/mounts//tune", "GET /v1/sys/mounts/tune/tune/", "GET *", "GET /v1/team/db1/config/",
	} {
		f.Add(line, "")
		f.Add(line, "team")
	}
	f.Fuzz(func(t *testing.T, line, namespace string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(line + " HTTP/1.1\r\nHost: kms.example\r\n\r\n")))
		if err != nil {
			t.Skip("net/http refuses it")
		}
		r.Header.Set("X-Vault-Token", token)
		r.Header.Set("X-Vault-Namespace", namespace)
		keys, log := newMemory(t), &trail{}
		h, err := vaultkv.New(config(keys, log))
		if err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if log.count() != 1 {
			t.Errorf("%d records", log.count())
		}
		if !slices.Contains([]int{200, 204, 400, 403, 404, 405, 413}, w.Code) {
			t.Errorf("answered %d", w.Code)
		}
		if body := w.Body.Bytes(); w.Code != 204 && !json.Valid(body) {
			t.Errorf("answered %q", body)
		}
	})
}

// FuzzPut sends any body to both kinds of mounts. What is stored comes back the same.
func FuzzPut(f *testing.F) {
	for _, body := range []string{
		`{"data":{"data":"` + hex16 + `"}}`, `{"data":{"a":[1,{"b":"\u00e9"}]},"options":{"cas":0}}`, `{"data":{},"options":null}`, `[]`, ``, `{"data":{"data":"\""}}`,
		`{"data":{"data":"é"}}`, `{"data":{"a":1,"a":2}}`, "{\"data\":{\"\xff\":1}}", `{"options":{"cas":1e0},"data":{}}`, `{"data":{"` + "\u2028" + `":1e400}}`,
	} {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body string) {
		keys, log := newMemory(t), &trail{}
		h, err := vaultkv.New(config(keys, log))
		if err != nil {
			t.Fatal(err)
		}
		switch w := record(h, "POST", "/v1/mariadb/data/1", body); w.Code {
		case 400, 413:
		case 200:
			nk, err := keys.NamedKey(t.Context(), "shop", "1", 0)
			if n := len(nk.Plaintext); err != nil || nk.Object || n != 16 && n != 24 && n != 32 {
				t.Errorf("MariaDB gets %d bytes, %v", n, err)
			}
		default:
			t.Errorf("answered %d", w.Code)
		}
		if w := record(h, "POST", "/v1/team/db1/data/1", body); w.Code != 200 {
			return
		}
		var sent, got struct{ Data json.RawMessage }
		if err := json.Unmarshal([]byte(body), &sent); err != nil {
			t.Fatalf("what was stored is not JSON: %v", err)
		}
		if err := json.Unmarshal(record(h, "GET", "/v1/team/db1/data/1", "").Body.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(got.Data, &got); err != nil {
			t.Fatal(err)
		}
		var want bytes.Buffer
		if err := json.Compact(&want, sent.Data); err != nil || !bytes.Equal(want.Bytes(), got.Data) {
			t.Errorf("sent %s, got %s, %v", sent.Data, got.Data, err)
		}
	})
}

// FuzzObject compares what is read with what encoding/json reads.
func FuzzObject(f *testing.F) {
	for _, text := range []string{`{}`, ` { "a" : [ ] , "b":{"c":[1,2,"]}"]},"d":-1.5e+9 , "\"e\\":null}`, `{"a":{}}`, `[{}]`, `1`, `{"a":1,"\u0061":2}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := vaultkv.Object(text)
		var want map[string]json.RawMessage
		if json.Unmarshal(text, &want) != nil || want == nil {
			if err == nil {
				t.Errorf("%q is read as %v", text, got)
			}
			return
		}
		if err != nil {
			return // stricter than encoding/json
		}
		for name, value := range got {
			var a, b any
			if err := errors.Join(json.Unmarshal(value, &a), json.Unmarshal(want[name], &b)); err != nil || !reflect.DeepEqual(a, b) {
				t.Errorf("%q: field %q is read as %s, want %s: %v", text, name, value, want[name], err)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%q: %d fields, want %d", text, len(got), len(want))
		}
	})
}
