package client

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
)

// Settings are a client's options as text, as flags and the environment have them.
// The zero value is a client without certificate and token.
type Settings struct {
	Addr   string // KMSD_ADDR
	CACert string // KMSD_CACERT, a PEM file; "" means the system's CAs
	Cert   string // KMSD_CERT, a PEM file
	Key    string // KMSD_KEY, a PEM file
	Token  string // KMSD_TOKEN
}

// FromEnv reads the settings from the environment.
func FromEnv() Settings {
	return Settings{
		Addr:   os.Getenv("KMSD_ADDR"),
		CACert: os.Getenv("KMSD_CACERT"),
		Cert:   os.Getenv("KMSD_CERT"),
		Key:    os.Getenv("KMSD_KEY"),
		Token:  os.Getenv("KMSD_TOKEN"),
	}
}

// New reads the files and makes the client.
func (s Settings) New() (*Client, error) {
	opts := Options{Token: strings.TrimSpace(s.Token)} // from a file it comes with the end of its line
	if s.Addr == "" {
		return nil, errors.New("the address of kmsd is not given (--addr or KMSD_ADDR)")
	}
	if s.CACert != "" {
		pem, err := os.ReadFile(s.CACert)
		if err != nil {
			return nil, fmt.Errorf("reading the CA certificate: %w", err)
		}
		opts.RootCAs = x509.NewCertPool()
		if !opts.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("reading the CA certificate: %s holds no PEM certificate", s.CACert)
		}
	}
	if s.Cert != "" || s.Key != "" {
		pair, err := tls.LoadX509KeyPair(s.Cert, s.Key)
		if err != nil {
			return nil, fmt.Errorf("reading the client certificate and its key: %w", err)
		}
		opts.Certificates = []tls.Certificate{pair}
	}
	return New(s.Addr, opts)
}
