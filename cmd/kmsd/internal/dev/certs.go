package dev

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"time"
)

const (
	caLife   = 10 * 365 * 24 * time.Hour
	leafLife = 365 * 24 * time.Hour
	renew    = 30 * 24 * time.Hour // before the end
)

// authority is the CA of a directory.
type authority struct {
	cert *x509.Certificate
	key  any
}

// makeCertificates makes the CA once, and the others when they are missing, about
// to end, or not good for the host that is served.
func (s *Site) makeCertificates() error {
	ca, err := s.makeAuthority()
	if err != nil {
		return fmt.Errorf("making the CA: %w", err)
	}
	u, err := url.Parse(s.Addr)
	if err != nil {
		return err
	}
	server := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "kmsd"},
		DNSNames:    []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip := net.ParseIP(u.Hostname()); ip != nil {
		server.IPAddresses = append(server.IPAddresses, ip)
	} else {
		server.DNSNames = append(server.DNSNames, u.Hostname())
	}
	client := &x509.Certificate{
		Subject:     pkix.Name{CommonName: clientName},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if err := s.makeLeaf("server", server, ca, u.Hostname()); err != nil {
		return fmt.Errorf("making the server's certificate: %w", err)
	}
	if err := s.makeLeaf("client", client, ca, ""); err != nil {
		return fmt.Errorf("making the client's certificate: %w", err)
	}
	return nil
}

func (s *Site) makeAuthority() (authority, error) {
	if ca, ok := s.loadPair("ca"); ok {
		return ca, nil
	}
	tmpl := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "kmsd dev CA"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	if err := s.issue("ca", tmpl, nil, caLife); err != nil {
		return authority{}, err
	}
	ca, ok := s.loadPair("ca")
	if !ok {
		return authority{}, fmt.Errorf("%s and %s do not fit", s.path("ca.pem"), s.path("ca.key"))
	}
	return ca, nil
}

// makeLeaf makes a certificate unless there is one that is good for host and for a
// while.
func (s *Site) makeLeaf(name string, tmpl *x509.Certificate, ca authority, host string) error {
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	if have, ok := s.loadPair(name); ok {
		opts := x509.VerifyOptions{Roots: roots, DNSName: host, KeyUsages: tmpl.ExtKeyUsage, CurrentTime: time.Now().Add(renew)}
		if _, err := have.cert.Verify(opts); err == nil {
			return nil
		}
	}
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	return s.issue(name, tmpl, &ca, leafLife)
}

// loadPair reads NAME.pem and NAME.key. Those that are missing, or do not fit
// because a crash came between them, do not count.
func (s *Site) loadPair(name string) (authority, bool) {
	pair, err := tls.LoadX509KeyPair(s.path(name+".pem"), s.path(name+".key"))
	if err != nil {
		return authority{}, false
	}
	return authority{cert: pair.Leaf, key: pair.PrivateKey}, true
}

// issue makes a key and its certificate, signed by ca, or by itself if that is
// nil.
func (s *Site) issue(name string, tmpl *x509.Certificate, ca *authority, life time.Duration) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if tmpl.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return err
	}
	tmpl.NotBefore = time.Now().Add(-time.Hour) // for clocks that differ
	tmpl.NotAfter = time.Now().Add(life)
	if ca == nil {
		ca = &authority{cert: tmpl, key: key}
	}
	cert, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, key.Public(), ca.key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := s.write(name+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})); err != nil {
		return err
	}
	return s.write(name+".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))
}
