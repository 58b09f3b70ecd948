package vaultkv_test

import (
	"bytes"
	"net/http"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/vaultkv"
	"kmsd/kms/api"
)

func TestValuesAreShownAsTheirMountsClientsReadThem(t *testing.T) {
	tests := map[string]struct {
		put    api.NamedKeyPut
		mount  string
		status int
		want   string
	}{
		"bytes for MariaDB are hexadecimal":         {api.NamedKeyPut{Plaintext: bytes.Repeat([]byte{0xAB}, 24)}, "mariadb", 200, `"data":{"data":"` + strings.Repeat("ab", 24) + `"}`},
		"bytes for others are base64":               {api.NamedKeyPut{Plaintext: []byte{0, 1, 2, 0xff}}, "plain", 200, `"data":{"value":"AAEC/w=="}`},
		"an object for others is what it was":       {api.NamedKeyPut{Plaintext: []byte(`{"a":1}`), Object: true}, "plain", 200, `"data":{"a":1}`},
		"an object is nothing for MariaDB":          {api.NamedKeyPut{Plaintext: []byte(`{"data":"00"}`), Object: true}, "mariadb", 400, `data key \"1\" is a JSON object and not a key for MariaDB`},
		"bytes that end mariadbd are not for it":    {api.NamedKeyPut{Plaintext: make([]byte, 20)}, "mariadb", 400, `data key \"1\" has 20 bytes; MariaDB takes 16, 24 or 32`},
		"more bytes than MariaDB takes neither":     {api.NamedKeyPut{Plaintext: make([]byte, 64)}, "mariadb", 400, `has 64 bytes`},
		"bytes that kmsd has made suit MariaDB":     {api.NamedKeyPut{}, "mariadb", 200, `"data":{"data":"`},
		"what kmsd has made of 16 bytes suits also": {api.NamedKeyPut{Bytes: 16}, "mariadb", 200, `"data":{"data":"`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := start(t, nil)
			s.put(t, "shop", "1", tt.put)
			status, body, err := s.ask(t, strings.Replace(get, "mariadb", tt.mount, 1))
			if err != nil || status != tt.status || !strings.Contains(body, tt.want) {
				t.Errorf("got %d %s, %v", status, body, err)
			}
			if r := s.trail.last(); r.NamedKey != "1" || r.Version != 1 || r.Action != "named-get" || r.Principal != token {
				t.Errorf("recorded %+v", r)
			}
		})
	}
}

// Names come from databases that encode them, or do not, as they like.
func TestIDsAreOpaque(t *testing.T) {
	s := start(t, nil)
	for raw, id := range map[string]string{
		"1":                        "1",
		"a/b":                      "a/b",
		"a%2Fc":                    "a/c",
		"a//b":                     "a//b",
		"/a":                       "/a",
		"a/":                       "a/",
		"..":                       "..",
		"../../sys/mounts/mariadb": "../../sys/mounts/mariadb",
		"./x":                      "./x",
		"a+b=":                     "a+b=",
		"a%2Bc%3D":                 "a+c=",
		"50%25":                    "50%",
		"a%252Fb":                  "a%2Fb",
		"%ff%00":                   "\xff\x00",
		"\xc3\xbc":                 "ü",
		"data/metadata/config":     "data/metadata/config",
		"a%3Fversion=2":            "a?version=2",
		strings.Repeat("x", 255):   strings.Repeat("x", 255),
	} {
		request := "POST /v1/team/db1/data/" + raw + " HTTP/1.1\nHost: kms.example\nX-Vault-Token: " + token
		status, body, err := s.ask(t, request+"\n\n"+`{"data":{"id":"`+strings.ToUpper("x")+`"}}`)
		if err != nil || status != 200 {
			t.Errorf("%q: got %d %s, %v", raw, status, body, err)
			continue
		}
		if nk, err := s.keys.NamedKey(t.Context(), "erp", id, 0); err != nil || nk.Version != 1 {
			t.Errorf("%q: version %d, %v", raw, nk.Version, err)
		}
		status, body, err = s.ask(t, strings.Replace(request, "POST", "GET", 1))
		if err != nil || status != 200 || !strings.Contains(body, `{"id":"X"}`) {
			t.Errorf("%q: read %d %s, %v", raw, status, body, err)
		}
	}
	status, body, err := s.ask(t, "GET /v1/team/db1/data/"+strings.Repeat("x", 256)+" HTTP/1.1\nHost: kms.example\nX-Vault-Token: "+token)
	if err != nil || status != 400 || !strings.Contains(body, "has 256 bytes") {
		t.Errorf("an ID that is too long: got %d %s, %v", status, body, err)
	}
}

func TestAListHasPages(t *testing.T) {
	s := start(t, nil)
	for i := range 2*api.MaxPage + 1 {
		id := strings.Repeat("x", i%250) + "/" + string(rune('a'+i/250))
		s.put(t, "erp", id, api.NamedKeyPut{Plaintext: []byte{1}})
	}
	s.put(t, "erp", "\xff", api.NamedKeyPut{Plaintext: []byte{1}})
	status, body, err := s.ask(t, "LIST /v1/team/db1/metadata/ HTTP/1.1\nHost: kms.example\nX-Vault-Token: "+token)
	if err != nil || status != 200 {
		t.Fatalf("got %d %s, %v", status, body, err)
	}
	if n := strings.Count(body, `x/"`); n != 249 {
		t.Errorf("%d folders, want each of 249 once", n)
	}
	if !strings.Contains(body, `{"keys":["/","x/"`) || !strings.Contains(body, `\ufffd"]`) {
		t.Errorf("got %.60s", body)
	}
}

func TestMountsCanBeExchanged(t *testing.T) {
	keys, log := newMemory(t), &trail{}
	cfg := config(keys, log)
	h, err := vaultkv.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(path string) (status int) { // 0: no answer
		defer func() {
			if p := recover(); p != nil && p != http.ErrAbortHandler {
				panic(p)
			}
		}()
		return record(h, "GET", "/v1/"+path, "").Code
	}
	if ask("sys/mounts/mariadb/tune") != 200 || ask("sys/mounts/other/tune") != 404 || ask("other/data/1") != 404 {
		t.Fatal("the mounts are not those that it was made with")
	}
	h.SetMounts(map[string]vaultkv.Mount{"other": {Database: "shop"}, "team/db2": {Database: "shop"}})
	if ask("sys/mounts/other/tune") != 200 || ask("team/config") != 404 {
		t.Error("the mounts are not the new ones")
	}
	for _, path := range []string{"sys/mounts/mariadb/tune", "mariadb/data/1", "mariadb/metadata/?list=true", "team/db1/data/1"} {
		if status := ask(path); status != 0 {
			t.Errorf("%s, which was there before, is answered with %d", path, status)
		}
	}
	h.SetMounts(map[string]vaultkv.Mount{"mariadb": {Database: "shop"}})
	if ask("sys/mounts/mariadb/tune") != 200 || ask("other/data/1") != 0 {
		t.Error("the mounts are not those that came back")
	}
}
