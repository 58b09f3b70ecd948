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
	LongIVSize   = 16 // of a token that makes its IVs itself, as a Luna in FIPS mode
	TagSize      = 16

	// MaxHeader is the most that [Envelope.AAD] puts before what the caller gave.
	MaxHeader = headerSize + IVSize

	MaxPlaintext = 64 << 10
	// MaxOverhead is the most that an envelope adds to its plaintext.
	MaxOverhead = headerSize + 1 + LongIVSize + TagSize
	MaxSize     = MaxPlaintext + MaxOverhead
)

const (
	magic      = "KMSD"
	headerSize = len(magic) + 2 + IdentitySize
	// minOverhead is what format version 1 adds to its plaintext.
	minOverhead = headerSize + IVSize + TagSize
)

// The format versions. Every new envelope has the second; the first is readable for
// ever.
const (
	version1 = 1
	version2 = 2
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

// Envelope is a wrapped key. A new one has format version 2:
//
//	 0      4   5   6               22   23     23+len        n-16        n
//	┌──────┬───┬───┬────────────────┬────┬───────┬─── ─ ─ ─ ─ ─┬───────────┐
//	│ KMSD │ 2 │alg│ identity       │len │ IV    │ ciphertext  │ tag       │
//	└──────┴───┴───┴────────────────┴────┴───────┴─── ─ ─ ─ ─ ─┴───────────┘
//	└─── authenticated header ──────┘
//
// The IV is 12 or 16 bytes long. It is no part of the header, because a token may choose
// it after it was given the header. Nothing is lost by that: GCM itself does not
// authenticate under another IV, nor under one that was cut at another place.
//
// Format version 1 has an IV of 12 bytes without its length, as a part of the header:
//
//	 0      4   5   6               22          34               n-16        n
//	┌──────┬───┬───┬────────────────┬───────────┬─── ─ ─ ─ ─ ───┬───────────┐
//	│ KMSD │ 1 │alg│ identity       │ IV        │  ciphertext   │ tag       │
//	└──────┴───┴───┴────────────────┴───────────┴─── ─ ─ ─ ─ ───┴───────────┘
//	└─────────── authenticated header ──────────┘
//
// The ciphertext is as long as the plaintext, 1 byte to 64 KiB.
type Envelope struct {
	Algorithm  Algorithm
	Identity   [IdentitySize]byte // which version of which key
	IV         []byte             // 12 or 16 bytes, never twice under one identity
	Ciphertext []byte             // with its tag at the end

	first bool // it was read as one of format version 1
}

// AAD is the additional authenticated data of GCM: the header, then what the
// caller gave. A new envelope needs no IV for it. The version says how long the header
// is, so no two pairs give the same bytes.
func (e Envelope) AAD(caller []byte) []byte {
	return append(e.appendHeader(make([]byte, 0, MaxHeader+len(caller))), caller...)
}

func (e Envelope) appendHeader(dst []byte) []byte {
	version := byte(version2)
	if e.first {
		version = version1
	}
	dst = append(dst, magic...)
	dst = append(dst, version, byte(e.Algorithm))
	dst = append(dst, e.Identity[:]...)
	if e.first {
		dst = append(dst, e.IV...)
	}
	return dst
}

// PlaintextSize is how many bytes the envelope gives when it is unwrapped.
func (e Envelope) PlaintextSize() int { return len(e.Ciphertext) - TagSize }

// Encode returns the envelope's bytes.
func (e Envelope) Encode() []byte {
	return e.AppendTo(make([]byte, 0, MaxOverhead-TagSize+len(e.Ciphertext)))
}

// AppendTo appends the envelope's bytes to dst and returns the longer slice.
func (e Envelope) AppendTo(dst []byte) []byte {
	dst = e.appendHeader(dst)
	if !e.first {
		dst = append(dst, byte(len(e.IV)))
		dst = append(dst, e.IV...)
	}
	return append(dst, e.Ciphertext...)
}

// Parse reads an envelope. Its IV and its Ciphertext are parts of b, not copies. It
// finds what is wrong with the form; only the key can tell whether the content is genuine.
func Parse(b []byte) (Envelope, error) {
	if len(b) < len(magic)+1 || string(b[:len(magic)]) != magic {
		return Envelope{}, fmt.Errorf("%w: it does not begin with %q", ErrFormat, magic)
	}
	version := b[len(magic)]
	if version != version1 && version != version2 {
		return Envelope{}, fmt.Errorf("%w: format version %d, this kmsd knows versions %d and %d", ErrFormat, version, version1, version2)
	}
	if len(b) < minOverhead+1 {
		return Envelope{}, tooShort(len(b), minOverhead+1)
	}
	e := Envelope{Algorithm: Algorithm(b[len(magic)+1]), first: version == version1}
	if e.Algorithm != AES256GCM && e.Algorithm != AES128GCM {
		return Envelope{}, fmt.Errorf("%w: unknown %v", ErrFormat, e.Algorithm)
	}
	copy(e.Identity[:], b[headerSize-IdentitySize:])
	at, size := headerSize, IVSize // where the IV is, and how long
	if !e.first {
		at, size = headerSize+1, int(b[headerSize])
	}
	if size != IVSize && size != LongIVSize {
		return Envelope{}, fmt.Errorf("%w: an IV of %d bytes, %d or %d expected", ErrFormat, size, IVSize, LongIVSize)
	}
	overhead := at + size + TagSize
	if len(b) < overhead+1 {
		return Envelope{}, tooShort(len(b), overhead+1)
	}
	if len(b) > overhead+MaxPlaintext {
		return Envelope{}, fmt.Errorf("%w: %d bytes, at most %d expected", ErrFormat, len(b), overhead+MaxPlaintext)
	}
	e.IV, e.Ciphertext = b[at:at+size:at+size], b[at+size:]
	return e, nil
}

func tooShort(n, least int) error {
	return fmt.Errorf("%w: %d bytes, at least %d expected; it is cut short", ErrFormat, n, least)
}
