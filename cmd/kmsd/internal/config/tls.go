package config

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"time"
)

// Load reads the files as they are now, for TLS 1.3 with HTTP/2. A client
// certificate is asked for only when there is a CA for it, and may be left out.
func (t TLS) Load() (*tls.Config, error) {
	pair, err := t.pair()
	if err != nil {
		return nil, fmt.Errorf("reading the certificate: %w", err)
	}
	conf := &tls.Config{
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{"h2", "http/1.1"},
		Certificates: []tls.Certificate{pair},
	}
	if t.ClientCA == "" {
		return conf, nil
	}
	if conf.ClientCAs, err = t.clients(); err != nil {
		return nil, fmt.Errorf("reading the CA of client certificates: %w", err)
	}
	conf.ClientAuth = tls.VerifyClientCertIfGiven
	return conf, nil
}

// endsSoon is how long before its end a certificate is worth a word.
const endsSoon = 14 * 24 * time.Hour

// Ending says that a certificate has ended or soon will, "" when it has time left. It
// stops nothing: a server that clients refuse can still be asked over its Unix socket.
func Ending(cert *x509.Certificate, now time.Time) string {
	end := cert.NotAfter.UTC().Format("2006-01-02 15:04:05Z07:00")
	switch left := cert.NotAfter.Sub(now); {
	case left <= 0:
		return "the certificate of the server ended at " + end + ": every client and database refuses it"
	case left < endsSoon:
		return "the certificate of the server ends at " + end + "; after that every client and database refuses it"
	default:
		return ""
	}
}

// Stamp changes when one of the files does. It is not a promise: a file that is
// changed twice within the clock's resolution may look the same.
func (t TLS) Stamp() string {
	var stamp string
	for _, path := range []string{t.Cert, t.Key, t.ClientCA} {
		if info, err := os.Stat(path); err == nil {
			stamp += fmt.Sprintf("%d %d;", info.Size(), info.ModTime().UnixNano())
		} else {
			stamp += "none;"
		}
	}
	return stamp
}

func (t TLS) pair() (tls.Certificate, error) {
	cert, err := readFile(t.Cert)
	if err != nil {
		return tls.Certificate{}, plain(err)
	}
	key, err := readKey(t.Key)
	if err != nil {
		return tls.Certificate{}, err
	}
	defer clear(key)
	return tls.X509KeyPair(cert, key)
}

// readKey reads the PEM of a private key, which nobody else may read.
func readKey(path string) ([]byte, error) { return readPrivate(path, maxFile) }

func (t TLS) clients() (*x509.CertPool, error) {
	pem, err := readFile(t.ClientCA)
	if err != nil {
		return nil, plain(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate in PEM", t.ClientCA)
	}
	return pool, nil
}
