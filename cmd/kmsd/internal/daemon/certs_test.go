package daemon_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/cmd/kmsd/internal/config"
	"kmsd/cmd/kmsd/internal/daemon"
)

func TestACertificateThatEndsIsToldOncePerDay(t *testing.T) {
	now := time.Now()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: now.Add(16 * 24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	files := config.TLS{Cert: filepath.Join(dir, "server.pem"), Key: filepath.Join(dir, "server.key")}
	write(t, files.Cert, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	write(t, files.Key, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})))

	var log buffer
	var times []time.Time
	for hour := range 20 * 24 {
		times = append(times, now.Add(time.Duration(hour)*time.Hour))
	}
	if err := daemon.TellEnds(files, hclog.New(&hclog.LoggerOptions{Output: &log}), times...); err != nil {
		t.Fatal(err)
	}
	soon, over := strings.Count(log.String(), " ends at "), strings.Count(log.String(), " ended at ")
	if soon < 13 || soon > 14 || over < 3 || over > 4 {
		t.Errorf("in 20 days it was told %d times that it ends in two weeks or less, and %d times that it has:\n%s", soon, over, log.String())
	}
}
