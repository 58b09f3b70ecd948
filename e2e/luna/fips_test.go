package luna_test

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"kmsd/kms/api"
	"kmsd/plugins/luna/lunasim"
)

// In FIPS mode an HSM chooses the IVs. What one wraps all unwrap, a rekey reaches everything,
// and a database that reads its keys over Vault's API finds what it has put.
func TestAGroupInFIPSMode(t *testing.T) {
	for _, tt := range []struct {
		name     string
		switches map[string]string
	}{
		{"an IV of 16 bytes is behind the tag", nil},
		{"an IV of 16 bytes is in the parameter", map[string]string{"gcm_iv": "params"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := lunasim.Options{HSMPolicies: map[int]int{12: 0}, Switches: tt.switches}
			s := start(t, o, o)
			s.create("shop-db", "")
			if !said(s.now("hsm-a").Token.Facts, "FIPS mode", "on") {
				t.Errorf("%+v does not say FIPS mode", s.now("hsm-a").Token.Facts)
			}
			plain := random(32)
			wrapped := s.wrapOn("hsm-a", plain)
			if bytes.Equal(wrapped, s.wrapOn("hsm-a", plain)) {
				t.Error("two envelopes are the same")
			}
			if got := s.unwrapOn("hsm-b", wrapped); !bytes.Equal(got, plain) {
				t.Errorf("%x unwraps to %x", plain, got)
			}
			s.databases(t)
		})
	}
}

// alone has one member serve, and gives the others back.
func (s *site) alone(name string) (all func()) {
	s.t.Helper()
	for _, m := range s.members {
		if m.name != name {
			if _, err := s.c.SetRole(s.t.Context(), "default", m.name, api.RoleStandby, true); err != nil {
				s.t.Fatal(err)
			}
		}
	}
	return func() {
		s.t.Helper()
		for _, m := range s.members {
			if _, err := s.c.SetRole(s.t.Context(), "default", m.name, api.RoleActive, true); err != nil {
				s.t.Fatal(err)
			}
		}
		s.awaitWhole()
	}
}

func (s *site) wrapOn(name string, plain []byte) []byte {
	s.t.Helper()
	defer s.alone(name)()
	wrapped, err := s.c.Wrap(s.t.Context(), "shop-db", plain, []byte("table 1"))
	if err != nil {
		s.t.Fatalf("wrapping on %s: %v", name, err)
	}
	return wrapped
}

func (s *site) unwrapOn(name string, wrapped []byte) []byte {
	s.t.Helper()
	defer s.alone(name)()
	plain, err := s.c.Unwrap(s.t.Context(), "shop-db", wrapped, []byte("table 1"))
	if err != nil {
		s.t.Fatalf("unwrapping on %s: %v", name, err)
	}
	return plain
}

// databases puts keys as MariaDB does, rekeys the database, and reads them again.
func (s *site) databases(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	if _, err := s.c.CreateDatabase(ctx, "shop", api.DatabaseOptions{Key: "shop-db"}); err != nil {
		t.Fatal(err)
	}
	values := map[string]string{}
	for id := range 20 {
		key := fmt.Sprint(id + 1)
		values[key] = hex.EncodeToString(random(32))
		s.vault(http.MethodPost, key, map[string]any{"data": map[string]any{"data": values[key]}})
	}
	job, err := s.c.Rekey(ctx, "shop", api.RekeyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s.poll(func() error {
		if job, err = s.c.Job(ctx, job.ID); err == nil && job.State != api.JobDone {
			err = fmt.Errorf("the job is %+v", job)
		}
		return err
	})
	if job.Failed > 0 {
		t.Errorf("the rekey ended with %+v", job)
	}
	for key, value := range values {
		if got := s.vault(http.MethodGet, key, nil); !strings.Contains(got, value) {
			t.Errorf("key %s: %s, want %s in it", key, got, value)
		}
	}
}

// vault sends a request to the mount for MariaDB.
func (s *site) vault(method, key string, body any) string {
	s.t.Helper()
	roots, err := template.RootCAs()
	if err != nil {
		s.t.Fatal(err)
	}
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
	b, err := json.Marshal(body)
	if err != nil {
		s.t.Fatal(err)
	}
	var text string
	s.poll(func() error { // the listener is there when a round trip has succeeded
		req, err := http.NewRequestWithContext(s.t.Context(), method, template.VaultAddr+"/v1/mariadb/data/"+key, bytes.NewReader(b))
		if err != nil {
			return err
		}
		req.Header.Set("X-Vault-Token", template.VaultToken)
		resp, err := c.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		if text = string(answer); err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s %s: %s: %s", method, key, resp.Status, text)
		}
		return err
	})
	return text
}
