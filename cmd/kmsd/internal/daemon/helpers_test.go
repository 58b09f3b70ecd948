package daemon_test

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"strings"
	"sync"
	"time"
)

// insecure trusts every server, and shows its certificate.
func insecure(see func(*x509.Certificate)) *tls.Config {
	return &tls.Config{
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			see(cs.PeerCertificates[0])
			return nil
		},
	}
}

func dialTLS(addr string, conf *tls.Config) (net.Conn, error) { return tls.Dial("tcp", addr, conf) }

// buffer keeps a log and tells when it has grown.
type buffer struct {
	mu    sync.Mutex // guards the rest
	text  strings.Builder
	grown chan struct{} // closed at the next write; nil when nobody waits
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.grown != nil {
		close(b.grown)
		b.grown = nil
	}
	return b.text.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func (b *buffer) reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text.Reset()
}

// await waits until the log holds text.
func (b *buffer) await(text string, limit time.Duration) bool {
	late := time.NewTimer(limit)
	defer late.Stop()
	for {
		b.mu.Lock()
		found := strings.Contains(b.text.String(), text)
		if b.grown == nil {
			b.grown = make(chan struct{})
		}
		grown := b.grown
		b.mu.Unlock()
		if found {
			return true
		}
		select {
		case <-grown:
		case <-late.C:
			return false
		}
	}
}
