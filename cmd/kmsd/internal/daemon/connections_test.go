package daemon_test

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"

	"kmsd/cmd/kmsd/internal/daemon"
)

// Connections over the limit are closed at once, and a closed one makes room.
func TestConnectionsAreBounded(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := daemon.NewBounded(inner, 1)
	accepted, ended := make(chan net.Conn), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- conn
		}
	}()
	defer func() { l.Close(); <-ended }()

	dial := func() net.Conn {
		t.Helper()
		conn, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	first := dial()
	defer first.Close()
	held := <-accepted
	second := dial()
	defer second.Close()
	if _, err := second.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a connection over the limit reads %v, want its end", err)
	}
	held.Close()
	held.Close() // gives its slot back once
	third := dial()
	defer third.Close()
	(<-accepted).Close()
}
