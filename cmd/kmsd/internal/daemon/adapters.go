package daemon

import (
	"context"

	"kmsd/cmd/kmsd/internal/audit"
	"kmsd/cmd/kmsd/internal/auth"
	"kmsd/cmd/kmsd/internal/httpapi"
)

// guard lets package auth answer the questions of package httpapi.
type guard struct{ auth *auth.Auth }

func (g guard) Authenticate(ctx context.Context, cr httpapi.Credentials) (httpapi.Caller, error) {
	c := auth.Credentials{Token: cr.Token, Certificate: cr.Certificate}
	if cr.PeerUID >= 0 {
		c.Peer = &auth.Peer{UID: cr.PeerUID}
	}
	p, err := g.auth.Authenticate(ctx, c)
	if err != nil {
		return nil, err
	}
	return p, nil
}

// scribe lets package audit write what package httpapi has seen.
type scribe struct{ log *audit.Log }

// Record is not broken off when its request is: what has been done is written down.
func (s scribe) Record(_ context.Context, r httpapi.Record) error {
	return s.log.Write(audit.Record(r))
}
