package vaultkv_test

import (
	"bytes"
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
)

var update = flag.Bool("update", false, "write the expected answers anew")

// TestClientsAreAnswered replays what the clients send, byte for byte, and compares the
// answers with those that they are known to understand: see the head of each file. It
// does so over one connection, over one for each request, and over HTTP/2.
func TestClientsAreAnswered(t *testing.T) {
	files, err := filepath.Glob("testdata/clients/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			for _, way := range []struct {
				name string
				ask  func(*testing.T, *site) func(string) (int, []byte, error)
			}{{"one connection", keptAlive}, {"a connection each", oneEach}, {"HTTP2", overHTTP2}} {
				t.Run(way.name, func(t *testing.T) { replay(t, file, way.ask) })
			}
		})
	}
}

func replay(t *testing.T, file string, way func(*testing.T, *site) func(string) (int, []byte, error)) {
	ar, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, nil)
	ask := way(t, s)
	requests := 0
	for i := 0; i+1 < len(ar.Files); i += 2 {
		request, want := ar.Files[i], ar.Files[i+1]
		status, body, err := ask(string(request.Data))
		if err != nil {
			t.Fatalf("%s: %v", request.Name, err)
		}
		got := fmt.Sprintf("%d\n%s", status, steady(body))
		if *update {
			ar.Files[i+1].Data = []byte(got)
		} else if got != string(want.Data) {
			t.Errorf("%s:\n%s\ngot %swant %s", request.Name, request.Data, got, want.Data)
		}
		requests++
		if s.trail.count() != requests {
			t.Fatalf("%s: %d records in the audit log for %d requests", request.Name, s.trail.count(), requests)
		}
	}
	if *update {
		if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

var (
	someID   = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}`)
	someTime = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`)
)

// steady leaves out what differs from time to time.
func steady(body []byte) []byte {
	body = someID.ReplaceAll(body, []byte("ID"))
	return someTime.ReplaceAll(body, []byte("TIME"))
}

func keptAlive(t *testing.T, s *site) func(string) (int, []byte, error) {
	c := s.dial(t)
	return func(request string) (int, []byte, error) {
		c.send(t, request)
		return c.receive()
	}
}

func oneEach(t *testing.T, s *site) func(string) (int, []byte, error) {
	return func(request string) (int, []byte, error) {
		status, body, err := s.ask(t, request)
		return status, []byte(body), err
	}
}

// overHTTP2 sends the same path and header in frames, as MariaDB does.
func overHTTP2(t *testing.T, s *site) func(string) (int, []byte, error) {
	client := http2Client(t)
	return func(request string) (int, []byte, error) {
		head, body, _ := strings.Cut(request, "\n\n")
		lines := strings.Split(strings.TrimSpace(head), "\n")
		method, rest, _ := strings.Cut(lines[0], " ")
		path, _, _ := strings.Cut(rest, " ")
		r := &http.Request{
			Method: method, URL: &url.URL{Scheme: "https", Host: s.addr, Opaque: path}, Header: http.Header{},
			Body: io.NopCloser(strings.NewReader(strings.TrimSpace(body))),
		}
		if strings.TrimSpace(body) == "" {
			r.Body = nil
		}
		for _, line := range lines[1:] {
			name, value, _ := strings.Cut(line, ": ")
			r.Header.Add(name, value)
		}
		r.Header.Del("Host")
		res, err := client.Do(r.WithContext(t.Context()))
		if err != nil {
			return 0, nil, err
		}
		defer res.Body.Close()
		if res.ProtoMajor != 2 {
			t.Errorf("it speaks %s", res.Proto)
		}
		var out bytes.Buffer
		_, err = out.ReadFrom(res.Body)
		return res.StatusCode, out.Bytes(), err
	}
}

func http2Client(t *testing.T) *http.Client {
	t.Helper()
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true, DisableCompression: true,
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}
