package vaultkv_test

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"syscall"
	"testing"

	"kmsd/kms/api"
)

// gone says whether an error is that of a connection which its other end has closed.
func gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET)
}

func TestTheEndClosesWhatWaitsAndAnswersWhatDoesNot(t *testing.T) {
	s := start(t, nil)
	s.put(t, "shop", "1", api.NamedKeyPut{})
	idle := s.dial(t)
	idle.send(t, get)
	if status, _, err := idle.receive(); err != nil || status != http.StatusOK {
		t.Fatalf("got %d, %v", status, err)
	}
	fresh := s.dial(t) // has not asked for anything yet
	bare, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer bare.Close()
	client := http2Client(t)
	res, err := client.Do(http2Get(t, s, "/v1/mariadb/data/1"))
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()

	held, release := s.hold()
	busy := s.dial(t)
	busy.send(t, get)
	<-held
	ended := make(chan struct{})
	go func() { defer close(ended); s.end() }()
	for name, c := range map[string]io.Reader{"an idle connection": idle, "a new one": fresh, "one that has not even said hello": bare} {
		if _, err := c.Read(make([]byte, 1)); !gone(err) {
			t.Errorf("%s reads %v, want its end", name, err)
		}
	}
	if conn, err := net.Dial("tcp", s.addr); err == nil {
		conn.Close()
		t.Error("somebody still comes in")
	}
	if res, err := client.Do(http2Get(t, s, "/v1/mariadb/data/1")); err == nil {
		res.Body.Close()
		t.Errorf("HTTP/2 is answered %s", res.Status)
	}
	select {
	case <-ended:
		t.Error("the end did not wait for the request under way")
	default:
	}
	release()
	if status, body, err := busy.receive(); err != nil || status != http.StatusOK {
		t.Errorf("the request under way got %d %s, %v", status, body, err)
	}
	<-ended
}

// A stream that is reset would leave the connection, and the client with the belief that
// the server is there.
func TestAFaultEndsTheWholeConnectionOfHTTP2(t *testing.T) {
	s := start(t, nil)
	s.put(t, "shop", "1", api.NamedKeyPut{})
	client := http2Client(t)
	ask := func() (reused bool, err error) {
		r := http2Get(t, s, "/v1/mariadb/data/1")
		trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { reused = info.Reused }}
		res, err := client.Do(r.WithContext(httptrace.WithClientTrace(r.Context(), trace)))
		if err == nil {
			res.Body.Close()
		}
		return reused, err
	}
	if reused, err := ask(); reused || err != nil {
		t.Fatalf("first: reused %v, %v", reused, err)
	}
	if reused, err := ask(); !reused || err != nil {
		t.Fatalf("second: reused %v, %v", reused, err)
	}
	s.failing(api.NewError(api.CodeGroupLost, "lost", nil))
	if _, err := ask(); err == nil {
		t.Fatal("a fault is answered")
	}
	s.failing(nil)
	if reused, err := ask(); reused || err != nil {
		t.Errorf("after a fault: reused %v, %v", reused, err)
	}
}
