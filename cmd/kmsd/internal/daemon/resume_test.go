package daemon_test

import (
	"crypto/tls"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"testing"
)

// A client certificate whose CA is not trusted any more is not saved by a TLS session
// of the time when it was.
func TestASessionDoesNotOutliveItsClientCA(t *testing.T) {
	r := start(t)
	pair, err := tls.LoadX509KeyPair(filepath.Join(r.site.Dir, "client.pem"), filepath.Join(r.site.Dir, "client.key"))
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{
		InsecureSkipVerify: true, // which server it is does not matter here
		Certificates:       []tls.Certificate{pair},
		ClientSessionCache: tls.NewLRUClientSessionCache(0),
	}}
	defer transport.CloseIdleConnections()
	ask := func() (status int, resumed bool) {
		t.Helper()
		transport.CloseIdleConnections()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.site.Addr+"/v1/groups", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Log(err) // a server may also refuse the connection
			return 0, false
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, resp.TLS.DidResume
	}
	if status, _ := ask(); status != http.StatusOK {
		t.Fatalf("with a good certificate: %d", status)
	}
	if status, resumed := ask(); status != http.StatusOK || !resumed {
		t.Fatalf("with a session: %d, resumed: %v", status, resumed)
	}

	other := start(t)
	other.stop()
	ca, err := os.ReadFile(filepath.Join(other.site.Dir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(r.site.Dir, "ca.pem"), string(ca))
	r.reload(t)
	if status, resumed := ask(); status == http.StatusOK {
		t.Errorf("a certificate of the old CA is good for %d, resumed: %v", status, resumed)
	}
}
