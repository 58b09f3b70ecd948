// Package pipetest answers: how does a test reach a server when no real time passes?
//
// A connection of a [Listener] is a [net.Pipe], which keeps its deadlines by the clock of
// a testing/synctest bubble: there a server with the timeouts of every day is tested in no
// time, and no pause of the machine can use them up.
package pipetest

import (
	"context"
	"net"
	"sync"
)

// Listener takes connections of this process. All methods may be called concurrently.
type Listener struct {
	conns chan net.Conn
	ended chan struct{} // closed by Close
	end   func()
}

// Listen returns a listener that has no address in the network.
func Listen() *Listener {
	l := &Listener{conns: make(chan net.Conn), ended: make(chan struct{})}
	l.end = sync.OnceFunc(func() { close(l.ended) })
	return l
}

// Dial connects, wherever the address leads, as a DialContext of package net/http does.
func (l *Listener) Dial(ctx context.Context, _, _ string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case l.conns <- far:
		return near, nil
	case <-l.ended:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.ended:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *Listener) Close() error {
	l.end()
	return nil
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return addr{} }

// addr is the address of every connection.
type addr struct{}

func (addr) Network() string { return "pipe" }
func (addr) String() string  { return "pipe" }
