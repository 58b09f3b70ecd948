// Package auth answers: who is it, and may they?
//
// A [Principal] is recognised by a bearer token, by a client certificate that TLS
// has verified, or, on a unix socket, by being root or the user that kmsd runs as.
// What is presented counts in this order, and the first that is there decides: a
// wrong token is not made good by a certificate.
//
// What a principal may do is in policies, each a list of rules:
//
//	policies:
//	  shop-app:
//	    - actions: [wrap, unwrap, rewrap, datakey]
//	      keys: ["shop-*"]
//	    - actions: [group-read]
//
// A rule allows its actions ("*": all) on the keys whose whole name one of its
// globs matches: * stands for any characters, also none, and ? for any one. Nothing
// else is special. Listing is allowed by the prefix that is listed. For the actions on
// databases and their data keys (database-..., named-...) the name of the database
// takes the place of the key's. A rule without keys is for actions that have no key
// (random, group-read, group-admin, backup); "*" covers these too. What no rule allows is
// denied.
//
// Principals are in a file of their own:
//
//	tokens:
//	  - name: shop-app
//	    sha256: 9f86d081...          # of the whole token; [NewToken] makes both
//	    policies: [shop-app]
//	    expires: 2027-01-01T00:00:00Z   # optional
//	certificates:
//	  - name: backup
//	    common_name: backup.example.org   # or sha256: of the certificate, or both
//	    policies: [backup]
//
// The files are read at the start and by Reload; every fault in them is reported
// at once, with its line, and a file with faults changes nothing.
package auth

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"kmsd/kms/api"
)

// Kind is how a principal was recognised.
type Kind string

const (
	KindToken       Kind = "token"
	KindCertificate Kind = "certificate"
	KindLocal       Kind = "local" // root or kmsd's own user, on a unix socket
)

// Config names the files. It is copied.
type Config struct {
	Tokens   string // who there is; "" means only local principals
	Policies string // what they may do; "" means no policies
}

// Auth recognises principals and decides what they may do. All methods may be
// called concurrently.
type Auth struct {
	cfg   Config
	uid   int // kmsd's own user
	state atomic.Pointer[state]
}

// state is everything in the two files. It is never changed, only exchanged.
type state struct {
	tokens       map[[sha256.Size]byte]*entry // :: SHA-256 of the token → whose it is
	certificates []*entry
	entries      map[identity]*entry
}

type identity struct {
	kind Kind
	name string
}

// entry is a principal as the file has it.
type entry struct {
	identity
	rules      []rule
	expires    time.Time         // of a token; zero: never
	sum        [sha256.Size]byte // of the token or the certificate
	hasSum     bool
	commonName string // of the certificate; "" when it does not matter
}

func (e *entry) expired() bool { return !e.expires.IsZero() && !time.Now().Before(e.expires) }

// New reads the files.
func New(cfg Config) (*Auth, error) {
	a := &Auth{cfg: cfg, uid: os.Geteuid()}
	if err := a.Reload(); err != nil {
		return nil, err
	}
	return a, nil
}

// Reload reads the files anew. What is in force changes only when both are without
// fault; otherwise it stays, and the error, of type Faults, lists every fault.
func (a *Auth) Reload() error {
	s, err := load(a.cfg)
	if err != nil {
		return fmt.Errorf("reading who may do what: %w", err)
	}
	a.state.Store(s)
	return nil
}

// Credentials are what a request brings to prove who sent it.
type Credentials struct {
	Token       string            // "" when there is none
	Certificate *x509.Certificate // verified by TLS; nil when there is none
	Peer        *Peer             // nil when the request did not come through a unix socket
}

// Peer is the process at the other end of a unix socket, as the kernel knows it.
type Peer struct {
	UID int
}

// Principal is somebody who was recognised.
type Principal struct {
	identity
	auth *Auth
}

// Name is how logs and messages call the principal. It is unique.
func (p Principal) Name() string { return p.name }

// Kind is how the principal was recognised.
func (p Principal) Kind() Kind { return p.kind }

// May says whether a policy in force now allows the action on the key of that
// name, "" for what has no key.
func (p Principal) May(action, key string) bool {
	return p.auth != nil && p.auth.Allow(p, action, key)
}

// Authenticate returns who sent the credentials. Every error is an
// api.ErrUnauthenticated whose text the sender may read.
func (a *Auth) Authenticate(_ context.Context, cr Credentials) (Principal, error) {
	s := a.state.Load()
	switch {
	case cr.Token != "":
		return a.byToken(s, cr.Token)
	case cr.Certificate != nil:
		return a.byCertificate(s, cr.Certificate)
	case cr.Peer != nil && (cr.Peer.UID == 0 || cr.Peer.UID == a.uid):
		return a.principal(identity{KindLocal, fmt.Sprintf("%s%d", localPrefix, cr.Peer.UID)})
	case cr.Peer != nil:
		return refuse("user %d is neither root nor the user of kmsd; a token is needed", cr.Peer.UID)
	default:
		return refuse("neither a token nor a client certificate was sent")
	}
}

// byToken finds a token by its SHA-256. The time of the look-up in the map depends
// on that digest, which tells nothing about a token of 256 random bits; the digest
// that was found is compared in constant time all the same.
func (a *Auth) byToken(s *state, token string) (Principal, error) {
	if !wellFormed(token) {
		return refuse("the token is not one of kmsd's (%s...)", tokenPrefix)
	}
	sum := sha256.Sum256([]byte(token))
	e := s.tokens[sum]
	if e == nil || subtle.ConstantTimeCompare(e.sum[:], sum[:]) != 1 {
		return refuse("the token is not known")
	}
	if e.expired() {
		return refuse("the token of %s expired at %s", e.name, e.expires.Format(time.RFC3339))
	}
	return a.principal(e.identity)
}

// byCertificate takes the entry with this very certificate before one with its
// name. TLS has checked the validity when the connection was made, which may be
// long ago.
func (a *Auth) byCertificate(s *state, cert *x509.Certificate) (Principal, error) {
	now := time.Now()
	if now.Before(cert.NotBefore) || now.After(cert.NotAfter) {
		return refuse("the client certificate %q is valid from %s to %s", cert.Subject.CommonName,
			cert.NotBefore.Format(time.RFC3339), cert.NotAfter.Format(time.RFC3339))
	}
	sum := sha256.Sum256(cert.Raw)
	var found *entry
	for _, e := range s.certificates {
		if e.hasSum && e.sum != sum || e.commonName != "" && e.commonName != cert.Subject.CommonName {
			continue
		}
		if found == nil || e.hasSum {
			found = e
		}
	}
	if found == nil {
		return refuse("the client certificate %q, SHA-256 %x, belongs to nobody", cert.Subject.CommonName, sum)
	}
	return a.principal(found.identity)
}

// Allow says whether a policy in force now allows the principal the action on the
// key of that name, "" for what has no key. An action that does not exist is not
// allowed to anybody.
func (a *Auth) Allow(p Principal, action, key string) bool {
	if !isAction(action) {
		return false
	}
	if p.kind == KindLocal {
		return p.auth == a // only Authenticate makes one
	}
	e := a.state.Load().entries[p.identity]
	if e == nil {
		return false // removed since
	}
	if e.expired() {
		return false
	}
	for _, r := range e.rules {
		if r.allows(action, key) {
			return true
		}
	}
	return false
}

func (a *Auth) principal(id identity) (Principal, error) {
	return Principal{identity: id, auth: a}, nil
}

func refuse(format string, args ...any) (Principal, error) {
	return Principal{}, api.NewError(api.CodeUnauthenticated, fmt.Sprintf(format, args...), nil)
}
