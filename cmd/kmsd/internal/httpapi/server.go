package httpapi

import (
	"crypto/tls"
	"net/http"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Server returns a server for one listener, with limits on what a client can hold
// open. conf is the TLS of a TCP listener and is copied; it is nil for a unix
// socket. A client certificate counts only when conf verifies it
// (tls.VerifyClientCertIfGiven), and only its first verified chain is looked at.
//
// Shutdown of the server ends the event streams of h.
func Server(h *Handler, conf *tls.Config, logger hclog.Logger) *http.Server {
	if logger == nil {
		logger = hclog.NewNullLogger()
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	s := &http.Server{
		Handler:           h,
		ConnContext:       withPeer,
		Protocols:         &protocols,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       2 * h.cfg.Limits.Timeout, // the body too; event streams lift it
		WriteTimeout:      2 * h.cfg.Limits.Timeout, // from the header on, so longer than any request
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 1000},
		// What a server logs is about connections: a failed handshake, a client that
		// speaks plain HTTP.
		ErrorLog: logger.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
	}
	if conf != nil {
		s.TLSConfig = conf.Clone()
		s.TLSConfig.MinVersion = tls.VersionTLS13
	}
	s.RegisterOnShutdown(h.Close)
	return s
}
