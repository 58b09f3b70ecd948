// Package envelope answers: what does a wrapped key look like?
//
// An envelope is all that a member needs to unwrap it again, beside the key and
// the caller's context (aad). This package only reads and writes bytes; an HSM
// encrypts and authenticates them.
package envelope

import (
	"errors"
	"fmt"
)

// Sizes in bytes.
const (
	IdentitySize = 16
	IVSize       = 12 // NIST SP 800-38D, section 5.2.1.1: the length GCM is made for
	TagSize      = 16
	HeaderSize   = len(magic) + 2 + IdentitySize + IVSize

	MaxPlaintext = 64 << 10
	// Overhead is what an envelope adds to its plaintext.
	Overhead = HeaderSize + TagSize
	MaxSize  = MaxPlaintext + Overhead
)

const (
	magic   = "KMSD"
	version = 1
)

// Algorithm says how the plaintext is encrypted.
type Algorithm byte

const (
	AES256GCM Algorithm = 1
	AES128GCM Algorithm = 2
)

func (a Algorithm) String() string {
	switch a {
	case AES256GCM:
		return "aes-256-gcm"
	case AES128GCM:
		return "aes-128-gcm"
	default:
		return fmt.Sprintf("algorithm %d", byte(a))
	}
}

// ErrFormat is what every error of Parse matches: these bytes are no envelope
// that this kmsd can read.
var ErrFormat = errors.New("not an envelope of kmsd")

// Header is what stands before the ciphertext. GCM authenticates all of it.
type Header struct {
	Algorithm Algorithm
	Identity  [IdentitySize]byte // which version of which key
	IV        [IVSize]byte       // never twice under one identity
}

// Envelope is a wrapped key, format version 1:
//
//	 0      4   5   6               22          34               n-16        n
//	┌──────┬───┬───┬────────────────┬───────────┬─── ─ ─ ─ ─ ───┬───────────┐
//	│ KMSD │ 1 │alg│ identity       │ IV        │  ciphertext   │ tag       │
//	└──────┴───┴───┴────────────────┴───────────┴─── ─ ─ ─ ─ ───┴───────────┘
//	└─────────── authenticated header ──────────┘
//
// The ciphertext is as long as the plaintext, 1 byte to 64 KiB.
type Envelope struct {
	Header
	Ciphertext []byte // with its tag at the end
}

// AAD is the additional authenticated data of GCM: the header, then what the
// caller gave. The header's length is fixed, so no two pairs give the same bytes.
func (h Header) AAD(caller []byte) []byte {
	return append(h.appendTo(make([]byte, 0, HeaderSize+len(caller))), caller...)
}

func (h Header) appendTo(dst []byte) []byte {
	dst = append(dst, magic...)
	dst = append(dst, version, byte(h.Algorithm))
	dst = append(dst, h.Identity[:]...)
	return append(dst, h.IV[:]...)
}

// Encode returns the envelope's bytes.
func (e Envelope) Encode() []byte {
	return e.AppendTo(make([]byte, 0, HeaderSize+len(e.Ciphertext)))
}

// AppendTo appends the envelope's bytes to dst and returns the longer slice.
func (e Envelope) AppendTo(dst []byte) []byte {
	return append(e.appendTo(dst), e.Ciphertext...)
}

// Parse reads an envelope. Its Ciphertext is part of b, not a copy. It finds what
// is wrong with the form; only the key can tell whether the content is genuine.
func Parse(b []byte) (Envelope, error) {
	if len(b) < len(magic)+1 || string(b[:len(magic)]) != magic {
		return Envelope{}, fmt.Errorf("%w: it does not begin with %q", ErrFormat, magic)
	}
	if v := b[len(magic)]; v != version {
		return Envelope{}, fmt.Errorf("%w: format version %d, this kmsd knows version %d", ErrFormat, v, version)
	}
	if len(b) < Overhead+1 {
		return Envelope{}, fmt.Errorf("%w: %d bytes, at least %d expected; it is cut short", ErrFormat, len(b), Overhead+1)
	}
	if len(b) > MaxSize {
		return Envelope{}, fmt.Errorf("%w: %d bytes, at most %d expected", ErrFormat, len(b), MaxSize)
	}
	b = b[len(magic)+1:]
	e := Envelope{Header: Header{Algorithm: Algorithm(b[0])}}
	switch e.Algorithm {
	case AES256GCM, AES128GCM:
	default:
		return Envelope{}, fmt.Errorf("%w: unknown %v", ErrFormat, e.Algorithm)
	}
	b = b[1:]
	b = b[copy(e.Identity[:], b):]
	e.Ciphertext = b[copy(e.IV[:], b):]
	return e, nil
}
