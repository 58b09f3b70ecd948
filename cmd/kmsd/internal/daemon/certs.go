package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/cmd/kmsd/internal/config"
)

// certWatch is the time between two looks at the files of the certificates.
const certWatch = 5 * time.Second

// certificates are the TLS files as they were last read without a fault.
type certificates struct {
	files   config.TLS
	current atomic.Pointer[tls.Config]

	mu   sync.Mutex // guards seen, and that one reload runs at a time
	seen string     // stamp of the files that were last tried

	told time.Time // when the log was last told that they end, which the start has told; watch's own
}

func newCertificates(files config.TLS) (*certificates, error) {
	c := &certificates{files: files, told: time.Now()}
	return c, c.reload()
}

// reload reads the files. On an error the old stay in force.
func (c *certificates) reload() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reloadLocked(c.files.Stamp())
}

func (c *certificates) reloadLocked(stamp string) error {
	c.seen = stamp
	conf, err := c.files.Load()
	if err != nil {
		return err
	}
	c.current.Store(conf)
	return nil
}

// reloadChanged reads the files if they are not those that were last tried, so
// that a fault is reported once.
func (c *certificates) reloadChanged() (changed bool, _ error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	stamp := c.files.Stamp()
	if stamp == c.seen {
		return false, nil
	}
	return true, c.reloadLocked(stamp)
}

// config is what a listener uses: for every connection the files as they are then.
func (c *certificates) config() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.current.Load(), nil },
	}
}

// watch looks at the files until ctx ends.
func (c *certificates) watch(ctx context.Context, log hclog.Logger) error {
	tick := time.NewTicker(certWatch)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		switch changed, err := c.reloadChanged(); {
		case err != nil:
			log.Error("reading the changed certificates; the old stay in force", "error", err)
		case changed:
			log.Info("read the changed certificates")
			c.told = time.Time{}
		}
		c.tellEnd(log, time.Now())
	}
}

// endPause is the time between two lines about a certificate that ends.
const endPause = 24 * time.Hour

func (c *certificates) tellEnd(log hclog.Logger, now time.Time) {
	if now.Sub(c.told) < endPause {
		return
	}
	c.told = now
	if text := config.Ending(c.leaf(), now); text != "" {
		log.Warn(text)
	}
}

// leaf is the certificate that clients see.
func (c *certificates) leaf() *x509.Certificate { return c.current.Load().Certificates[0].Leaf }

// end is when it ends.
func (c *certificates) end() time.Time { return c.leaf().NotAfter }
