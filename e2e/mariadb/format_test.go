package mariadb_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"kmsd/kms/api"
)

// With a key of another length mariadbd ends when it writes a page, and at every start after
// that.
func TestOnlyKeysThatMariaDBCanUseAreStored(t *testing.T) {
	s := start(t)
	pool, err := s.kmsd.Env.RootCAs()
	if err != nil {
		t.Fatal(err)
	}
	vault := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	defer vault.CloseIdleConnections()
	ask := func(t *testing.T, method, id, body string) (status int, text string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, s.kmsd.Env.VaultAddr+"/v1/mariadb/data/"+id, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Vault-Token", s.kmsd.Env.Token) // it may do everything
		resp, err := vault.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	value := func(n int) string { return fmt.Sprintf(`{"data":{"data":"%s"}}`, strings.Repeat("5a", n)) }

	refused := []struct{ name, method, body string }{
		{"no bytes", http.MethodPost, value(0)},
		{"1 byte", http.MethodPost, value(1)},
		{"20 bytes", http.MethodPost, value(20)},
		{"31 bytes", http.MethodPut, value(31)},
		{"33 bytes", http.MethodPost, value(33)},
		{"an odd number of digits", http.MethodPost, `{"data":{"data":"` + strings.Repeat("5", 63) + `"}}`},
		{"base64", http.MethodPost, `{"data":{"data":"WlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlo="}}`},
		{"another field", http.MethodPost, `{"data":{"key":"` + strings.Repeat("5a", 32) + `"}}`},
		{"a number", http.MethodPost, `{"data":{"data":5}}`},
		{"a deletion", http.MethodDelete, ""},
	}
	for _, tt := range refused {
		t.Run(tt.name+" by the Vault protocol", func(t *testing.T) {
			if status, text := ask(t, tt.method, "1", tt.body); status != http.StatusBadRequest || !strings.Contains(text, "MariaDB") {
				t.Errorf("%d %s; want 400 and why", status, text)
			}
		})
	}
	for _, n := range []int{1, 20, 31, 33} {
		t.Run(fmt.Sprintf("%d bytes by the API of kmsd", n), func(t *testing.T) {
			for _, put := range []api.NamedKeyPut{{Plaintext: bytes.Repeat([]byte{'Z'}, n)}, {Bytes: n}} {
				if _, err := s.c.PutNamedKey(t.Context(), database, "1", put); !errors.Is(err, api.ErrBadRequest) {
					t.Errorf("got %v, want %v", err, api.ErrBadRequest)
				}
			}
		})
	}
	if k, err := s.c.DescribeNamedKey(t.Context(), database, "1"); err != nil || k.Newest != 1 {
		t.Errorf("key 1 has %d versions, %v; want 1", k.Newest, err)
	}

	for i, n := range []int{16, 24, 32} {
		id := fmt.Sprint(10 + i)
		if status, text := ask(t, http.MethodPost, id, value(n)); status != http.StatusOK {
			t.Fatalf("%d bytes: %d %s", n, status, text)
		}
		s.do(t, fmt.Sprintf("CREATE TABLE shop.with_%d (id INT PRIMARY KEY) ENCRYPTION_KEY_ID=%s", n, id))
		s.do(t, fmt.Sprintf("INSERT INTO shop.with_%d SELECT * FROM shop.seq_1_to_1000", n))
	}
	s.restartMariaDB(t)
	for _, n := range []int{16, 24, 32} {
		s.isSound(t, fmt.Sprintf("shop.with_%d", n))
	}
	s.hasNoComplaint(t, "")
}
