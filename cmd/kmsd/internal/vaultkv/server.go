package vaultkv

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Server serves a handler on one listener, once.
type Server struct {
	http *http.Server

	mu    sync.Mutex // guards the rest
	conns map[net.Conn]http.ConnState
	ended bool
}

// NewServer returns a server for one listener. conf is copied.
func NewServer(h *Handler, conf *tls.Config, log hclog.Logger) *Server {
	if log == nil {
		log = hclog.NewNullLogger()
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	s := &Server{conns: make(map[net.Conn]http.ConnState)}
	s.http = &http.Server{
		Handler:           h,
		TLSConfig:         conf.Clone(),
		Protocols:         &protocols,
		ConnContext:       withConnection,
		ConnState:         s.note,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       h.cfg.Timeout,     // the body too
		WriteTimeout:      2 * h.cfg.Timeout, // from the header on, so longer than any request
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 250},
		// What a server logs is about connections: a failed handshake, a client that
		// speaks plain HTTP.
		ErrorLog: log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
	}
	s.http.TLSConfig.MinVersion = tls.VersionTLS13
	s.http.RegisterOnShutdown(s.closeWaiting) // when the listener is closed: nobody comes back
	return s
}

// Serve serves until End, and then returns nil at once, while requests may still be
// under way.
func (s *Server) Serve(l net.Listener) error {
	err := s.http.ServeTLS(l, "", "")
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// End closes the listener and every connection that waits for a request, lets the
// requests under way come to their end, and returns when there is none. When ctx ends
// first, they are broken off.
func (s *Server) End(ctx context.Context) error {
	if err := s.http.Shutdown(ctx); err != nil {
		return errors.Join(err, s.http.Close())
	}
	return nil
}

// note keeps what the connections are doing. One that is new, or has done with its
// requests, when the end has begun is closed.
func (s *Server) note(conn net.Conn, state http.ConnState) {
	s.mu.Lock()
	if state == http.StateClosed || state == http.StateHijacked {
		delete(s.conns, conn)
	} else {
		s.conns[conn] = state
	}
	ended := s.ended
	s.mu.Unlock()
	if ended && waiting(state) {
		_ = under(conn).Close()
	}
}

func (s *Server) closeWaiting() {
	s.mu.Lock()
	s.ended = true
	var idle []net.Conn
	for conn, state := range s.conns {
		if waiting(state) {
			idle = append(idle, conn)
		}
	}
	s.mu.Unlock()
	for _, conn := range idle {
		_ = under(conn).Close() // its client sees that, and nobody else is interested
	}
}

// waiting says whether a connection has no request. Over a new one TLS may still be
// shaking hands.
func waiting(state http.ConnState) bool {
	return state == http.StateNew || state == http.StateIdle
}

// connection is the context key under which a request finds its own.
type connection struct{}

func withConnection(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connection{}, conn)
}

// under is what TLS goes over: closing it waits for nobody.
func under(conn net.Conn) net.Conn {
	if t, ok := conn.(*tls.Conn); ok {
		return t.NetConn()
	}
	return conn
}
