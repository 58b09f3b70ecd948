package vendor

// #include "vendor.h"
import "C"

import (
	"fmt"

	"github.com/miekg/pkcs11"
)

// element is the type of keys where the library counts types; the firmware counts otherwise.
const element = 0 // CK_CRYPTOKI_ELEMENT

// Certificate is the kind of a token's certificate.
type Certificate uint

// The token wrapping certificates of Luna: the RSA one and the one on a curve.
const (
	TWC3   Certificate = 0xB
	TWCECC Certificate = 0xF
)

// Certificate returns a certificate of the HSM in a slot.
func (l *Library) Certificate(slot uint, kind Certificate) ([]byte, error) {
	f, err := l.need(GetTokenCertificates)
	if err != nil {
		return nil, err
	}
	return output(GetTokenCertificates, func(out *C.byte_t, n *C.ulong_t) C.ulong_t {
		return C.ca_certificate(f, C.ulong_t(slot), C.ulong_t(kind), out, n)
	})
}

// KEV makes a key exchange value of CPv1.
func (l *Library) KEV(h pkcs11.SessionHandle) ([]byte, error) {
	f, err := l.need(GenerateCloningKEV)
	if err != nil {
		return nil, err
	}
	return output(GenerateCloningKEV, func(out *C.byte_t, n *C.ulong_t) C.ulong_t {
		return C.ca_kev(f, C.ulong_t(h), out, n)
	})
}

// SourceInit begins CPv3.
func (l *Library) SourceInit(h pkcs11.SessionHandle) ([]byte, error) {
	f, err := l.need(CloneAsSourceInit)
	if err != nil {
		return nil, err
	}
	return output(CloneAsSourceInit, func(out *C.byte_t, n *C.ulong_t) C.ulong_t {
		return C.ca_source_init(f, C.ulong_t(h), out, n)
	})
}

// TargetInit takes the source's certificate and a KEV (CPv1), or what the source began with
// and none (CPv3).
func (l *Library) TargetInit(h pkcs11.SessionHandle, in, kev []byte) ([]byte, error) {
	f, err := l.need(CloneAsTargetInit)
	if err != nil {
		return nil, err
	}
	return output(CloneAsTargetInit, func(out *C.byte_t, n *C.ulong_t) C.ulong_t {
		return C.ca_target_init(f, C.ulong_t(h), pointer(in), C.ulong_t(len(in)), pointer(kev), C.ulong_t(len(kev)), out, n)
	})
}

// AsSource gives an object to the target that said in.
func (l *Library) AsSource(h pkcs11.SessionHandle, object pkcs11.ObjectHandle, in []byte) ([]byte, error) {
	f, err := l.need(CloneAsSource)
	if err != nil {
		return nil, err
	}
	return output(CloneAsSource, func(out *C.byte_t, n *C.ulong_t) C.ulong_t {
		return C.ca_as_source(f, C.ulong_t(h), element, C.ulong_t(object), pointer(in), C.ulong_t(len(in)), out, n)
	})
}

// AsTarget takes an object. The KEV is that of [Library.TargetInit].
func (l *Library) AsTarget(h pkcs11.SessionHandle, kev, in []byte) (pkcs11.ObjectHandle, error) {
	f, err := l.need(CloneAsTarget)
	if err != nil {
		return 0, err
	}
	var object C.ulong_t
	err = check(CloneAsTarget, C.ca_as_target(f, C.ulong_t(h), pointer(kev), C.ulong_t(len(kev)), pointer(in), C.ulong_t(len(in)), element, &object))
	return pkcs11.ObjectHandle(object), err
}

// maxProtocolBuffer is the size of every buffer of CPv4: PCPROT_MAX_BUFFER_SIZE of Thales'
// Python binding. The functions are not asked for sizes.
const maxProtocolBuffer = 64000

// NegotiationStart begins CPv4 at the target.
func (l *Library) NegotiationStart(h pkcs11.SessionHandle) (step uint, out []byte, err error) {
	f, err := l.need(MigrationStartSessionNegotiation)
	if err != nil {
		return 0, nil, err
	}
	var next C.ulong_t
	out, err = outputOf(MigrationStartSessionNegotiation, maxProtocolBuffer, func(out *C.byte_t, n *C.ulong_t) C.ulong_t {
		return C.ca_negotiation_start(f, C.ulong_t(h), &next, n, out)
	})
	return uint(next), out, err
}

// Negotiated is what one end said on the way to a tunnel.
type Negotiated struct {
	Step   uint
	Out    []byte
	Tunnel []byte // the identity of the tunnel; empty before there is one
}

// NegotiationContinue goes on with CPv4.
func (l *Library) NegotiationContinue(h pkcs11.SessionHandle, step uint, in []byte) (Negotiated, error) {
	f, err := l.need(MigrationContinueSessionNegotiation)
	if err != nil {
		return Negotiated{}, err
	}
	tunnel := make([]byte, maxProtocolBuffer)
	// What the values of status mean is not written anywhere; the return value decides.
	var next, status, tunnelSize C.ulong_t
	out, n := make([]byte, maxProtocolBuffer), C.ulong_t(maxProtocolBuffer)
	tunnelSize = maxProtocolBuffer
	rv := C.ca_negotiation_go_on(f, C.ulong_t(h), C.ulong_t(step), pointer(in), C.ulong_t(len(in)), &next,
		pointer(out), &n, &status, pointer(tunnel), &tunnelSize)
	if err := check(MigrationContinueSessionNegotiation, rv); err != nil {
		return Negotiated{}, err
	}
	if n > maxProtocolBuffer || tunnelSize > maxProtocolBuffer {
		return Negotiated{}, fmt.Errorf("%s says that it wrote %d and %d bytes where there is room for %d: %w",
			MigrationContinueSessionNegotiation, n, tunnelSize, maxProtocolBuffer, pkcs11.Error(pkcs11.CKR_GENERAL_ERROR))
	}
	return Negotiated{Step: uint(next), Out: out[:n], Tunnel: tunnel[:tunnelSize]}, nil
}

// NegotiationClose ends a tunnel.
func (l *Library) NegotiationClose(h pkcs11.SessionHandle, tunnel []byte) error {
	f, err := l.need(MigrationCloseSession)
	if err != nil {
		return err
	}
	return check(MigrationCloseSession, C.ca_negotiation_close(f, C.ulong_t(h), pointer(tunnel), C.ulong_t(len(tunnel))))
}
