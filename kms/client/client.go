// Package client answers: how does a program use a kmsd that runs elsewhere?
//
// A [Client] is an [api.Service], an [api.Admin], an [api.Databases] and an [api.Backups],
// as the result of kms.Open is, so that a program can take either:
//
//	c, err := client.New("https://kms.example:8420", client.Options{RootCAs: pool, Token: token})
//	...
//	defer c.Close()
//	wrapped, err := c.Wrap(ctx, "shop", dek, []byte("table orders"))
//
// Errors are [*api.Error] with the server's code, message and hint; compare with
// errors.Is(err, api.ErrNotFound). What failed in a way that may pass is tried
// again by the client itself, within the time of the context, if doing it twice does
// no harm: wrapping, unwrapping, signing, reading. Making, rotating and destroying keys
// and data keys, and what is done to groups and members, is tried again only when the request has
// certainly not reached kmsd.
package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"kmsd/kms/api"
)

// DefaultPort is that of an https address without one.
const DefaultPort = "8420"

// Options are what New needs besides the address. They are copied.
type Options struct {
	RootCAs      *x509.CertPool    // that sign kmsd's certificate; nil means the system's
	Certificates []tls.Certificate // of the client, when kmsd wants one
	Token        string            // bearer token; "" when a certificate or a unix socket is enough

	// Timeout is for calls whose context has no deadline. Zero means 30 s.
	Timeout time.Duration
	// Attempts is how often a call is tried in all. Zero means 4; 1 means never again.
	Attempts int
}

// Client speaks to one kmsd. It keeps connections open between calls and may be
// used concurrently.
type Client struct {
	base  string // what a path is appended to: https://host:port
	shown string // the address as the user gave it, for messages
	opts  Options
	http  *http.Client

	closed context.Context // ended by Close; so are the calls and streams under way
	close  context.CancelFunc

	mu   sync.Mutex // guards last
	last api.Status // what Status falls back to
}

var (
	_ api.Service   = (*Client)(nil)
	_ api.Admin     = (*Client)(nil)
	_ api.Databases = (*Client)(nil)
	_ api.Backups   = (*Client)(nil)
)

// New returns a client of the kmsd at addr: https://HOST[:PORT] or
// unix:///PATH/TO/SOCKET. It does not connect yet.
func New(addr string, opts Options) (*Client, error) {
	u, err := url.Parse(addr)
	if err != nil { // its text is about Go's idea of a URL: HOST:PORT is the usual reason
		return nil, fmt.Errorf("the address of kmsd is %q, want https://HOST[:PORT] or unix:///PATH", clip(addr))
	}
	if !presentable(opts.Token) {
		return nil, fmt.Errorf("the token has characters that no token has, or more than %d", maxToken)
	}
	if opts.Timeout == 0 {
		opts.Timeout = 30 * time.Second
	}
	if opts.Attempts == 0 {
		opts.Attempts = 4
	}
	opts.Certificates = append([]tls.Certificate(nil), opts.Certificates...)
	c := &Client{shown: addr, opts: opts}
	t := transport(opts)
	switch {
	case u.Scheme == "unix" && u.Host == "" && u.Path != "":
		c.base = "http://kmsd"
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", u.Path)
		}
	case u.Scheme == "https" && u.Hostname() != "" && (u.Path == "" || u.Path == "/") && u.RawQuery == "" && u.User == nil:
		port := u.Port()
		if port == "" {
			port = DefaultPort
		}
		c.base = "https://" + net.JoinHostPort(u.Hostname(), port)
	default:
		return nil, fmt.Errorf("the address of kmsd is %q, want https://HOST[:PORT] or unix:///PATH", u.Redacted())
	}
	c.http = &http.Client{
		Transport: t,
		// A redirect would carry the token to another place.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	c.closed, c.close = context.WithCancel(context.Background())
	return c, nil
}

// maxToken is the longest token that is sent, in bytes. A server reads 16 KiB of
// header in all.
const maxToken = 4096

// presentable says whether a token can stand in a header.
func presentable(token string) bool {
	return len(token) <= maxToken && strings.IndexFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
}

// clip shortens foreign text that goes into a message, and leaves out what is before an
// @, which may be a password.
func clip(s string) string {
	const most = 128
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		s = "..." + s[i:]
	}
	if len(s) > most {
		s = s[:most] + "..."
	}
	return s
}

// transport keeps enough connections for several hundred calls at once. They are
// HTTP/1.1 on purpose (BenchmarkProtocols in httpapi, client and server together):
// one HTTP/2 connection takes 1.6 times the CPU for each call of a single caller and
// about the same with 64 and 500, and when it breaks, all calls break.
func transport(opts Options) *http.Transport {
	const idle = 1024 // connections
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	return &http.Transport{
		DialContext: (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		TLSClientConfig: &tls.Config{
			MinVersion:         tls.VersionTLS13,
			RootCAs:            opts.RootCAs,
			Certificates:       opts.Certificates,
			ClientSessionCache: tls.NewLRUClientSessionCache(0),
		},
		Protocols:              &protocols,
		TLSHandshakeTimeout:    5 * time.Second,
		MaxIdleConns:           idle,
		MaxIdleConnsPerHost:    idle,
		IdleConnTimeout:        time.Minute, // less than the server's, so that it never closes first
		DisableCompression:     true,
		MaxResponseHeaderBytes: 16 << 10,
	}
}

// Close ends the calls and event streams under way and closes the connections.
func (c *Client) Close() error {
	c.close()
	c.http.CloseIdleConnections()
	return nil
}
