package devserver

import (
	"context"
	"crypto/x509"
	"fmt"
	"os"

	"kmsd/kms/api"
	"kmsd/kms/client"
)

// Client makes a client that tries every call at most this often; 0 means as often
// as a program does by default, 1 shows every failure of kmsd.
func (e Env) Client(attempts int) (*client.Client, error) {
	pool, err := e.RootCAs()
	if err != nil {
		return nil, err
	}
	return client.New(e.Addr, client.Options{RootCAs: pool, Token: e.Token, Attempts: attempts})
}

// RootCAs reads the certificate that signs kmsd's.
func (e Env) RootCAs() (*x509.CertPool, error) {
	pem, err := os.ReadFile(e.CACert)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no PEM certificate", e.CACert)
	}
	return pool, nil
}

// Groups is what AwaitWhole needs of a client.
type Groups interface {
	Group(ctx context.Context, group string) (api.Group, error)
}

// AwaitWhole waits until every member of the default group is in step and holds
// every key.
func AwaitWhole(ctx context.Context, groups Groups) (api.Group, error) {
	var g api.Group
	err := Poll(ctx, func() error {
		var err error
		if g, err = groups.Group(ctx, DefaultGroup); err != nil {
			return err
		}
		return AllActive(g)
	})
	if err != nil {
		return g, fmt.Errorf("waiting for every member to be active with every key: %w", err)
	}
	return g, nil
}

// DefaultGroup is the group that "kmsd dev" makes.
const DefaultGroup = "default"
