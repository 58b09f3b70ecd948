package httpapi

import (
	"context"
	"crypto/x509"
	"net"
	"net/http"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Credentials are what a request brings to prove who sent it. At most one of them
// is needed; the Authenticator decides which counts.
type Credentials struct {
	Token       string            // of "Authorization: Bearer TOKEN"; "" when there is none
	Certificate *x509.Certificate // verified by TLS against the client CA; nil when there is none
	PeerUID     int               // user at the other end of a unix socket; -1 when it is not one
}

// Authenticator says who sends a request.
type Authenticator interface {
	// Authenticate returns the caller, or an error whose text the client may read.
	// Every error is answered as unauthenticated.
	Authenticate(ctx context.Context, cr Credentials) (Caller, error)
}

// Caller is an authenticated principal and what it may do. It is used for one
// request.
type Caller interface {
	Name() string
	// May says whether a policy allows the action on the key of that name; the name
	// is "" for what has no key.
	May(action, key string) bool
}

// Auditor remembers who did what. A request whose record cannot be written is not
// answered.
type Auditor interface {
	Record(ctx context.Context, r Record) error
}

// Record is what the audit log gets to know about a request. It has no field that
// could hold plaintext, a PIN, a token or a key.
type Record struct {
	Time          time.Time // when the request came
	RequestID     string
	Principal     string // "" when nobody was recognised
	Remote        string // address of the client, or "unix:UID"
	Action        string
	Operation     string // what was done under an action that allows several; "" for the others
	Group         string
	Key           string // a well-formed name, or ""
	Database      string // whose data keys it was about, a well-formed name, or ""
	NamedKey      string // ID of a data key, any bytes; "" when there were several or none
	Job           string // ID of the job that was asked about or begun; "" when there was none
	Member        string
	Version       int    // of the key that was used; 0 when there were several or none
	Items         int    // in a batch; 0 when it was none
	Failed        int    // items of the batch that failed
	AllowDegraded bool   // fewer copies than min_copies were asked for
	Force         bool   // a member was to go although it was the last
	Adopt         bool   // unknown objects of a token were to become keys
	Spec          string // how a member was described; "" when it was not
	Suppressed    int    // requests without a principal that have no record of their own
	Outcome       string // "ok", or the code of the error
	Duration      time.Duration
}

// peerUID is the context key under which a connection keeps the user at the other
// end of a unix socket.
type peerUID struct{}

// withPeer is http.Server.ConnContext: it asks the kernel once per connection who
// the peer of a unix socket is.
func withPeer(ctx context.Context, conn net.Conn) context.Context {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || credErr != nil {
		return ctx
	}
	return context.WithValue(ctx, peerUID{}, int(cred.Uid))
}

// credentialsOf collects what r brings. A malformed Authorization header counts as
// none.
func credentialsOf(r *http.Request) Credentials {
	cr := Credentials{PeerUID: -1}
	if uid, ok := r.Context().Value(peerUID{}).(int); ok {
		cr.PeerUID = uid
	}
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 && len(r.TLS.VerifiedChains[0]) > 0 {
		cr.Certificate = r.TLS.VerifiedChains[0][0]
	}
	const scheme = "bearer "
	if h := r.Header.Get("Authorization"); len(h) > len(scheme) && strings.EqualFold(h[:len(scheme)], scheme) {
		cr.Token = strings.TrimSpace(h[len(scheme):])
	}
	return cr
}
