// Package pluginproto answers: what may be asked of a token?
//
// [Driver] is the narrow waist of kmsd. A driver process implements it on top
// of one PKCS#11 library and one token; the core calls the same interface. Only
// the adapters of this package know that a process wall lies between the two
// ([Serve] on the driver's side, [Client] on the core's).
//
// Three rules hold on both sides of the wall:
//
//   - No handle crosses it. A key is named by its [KeyID], the same on every
//     member of a group. Session and object handles live and die inside one driver.
//   - Every failure is an [*Error] of one of five classes. Only [ClassMember]
//     means "try another member", and only [ClassNotFound] may ever be reported as
//     absence.
//   - A driver is disposable. When a call hangs or the token is lost, the process
//     is ended and a new one is started.
package pluginproto

import (
	"context"
	"encoding/hex"
	"fmt"
)

// Driver is one token behind one PKCS#11 library.
//
// All methods may be called concurrently once Open has returned. Every error is,
// or wraps, an [*Error]. A context that ends makes a call return early with the
// context's error; the C call behind it may still run to its end.
type Driver interface {
	// Open loads the library, finds the token, logs in and derives the domain
	// key. It is called once, before any other method.
	Open(ctx context.Context, req OpenRequest) (TokenInfo, error)

	// List returns every key on the token whose CKA_ID is a KeyID, each with its
	// check value, in no particular order.
	List(ctx context.Context) ([]Object, error)

	// Inspect reads one key from the token, past every cache, and computes its
	// check value anew.
	Inspect(ctx context.Context, id KeyID) (Object, error)

	// Generate makes a secret key or a key pair on the token. An identity that
	// exists already is an error of ClassCaller.
	Generate(ctx context.Context, spec KeySpec) (Object, error)

	// SetAttributes changes what may change on a key after it is made.
	SetAttributes(ctx context.Context, id KeyID, attrs Attributes) error

	// Destroy removes a key, both halves of a pair. A key that is not there is
	// ClassNotFound.
	Destroy(ctx context.Context, id KeyID) error

	// CloneStep takes one step of copying keys from one token to another. The core
	// picks a protocol that both ends know and relays blobs between a source and a
	// target driver, starting at the source with step 0 and no blob, until the target
	// answers Done. No blob ever holds a key in the clear. A key that the target holds
	// already, with an equal check value, is a success without effect.
	CloneStep(ctx context.Context, req CloneRequest) (CloneReply, error)

	// Facts returns what TokenInfo.Facts says, as it is now.
	Facts(ctx context.Context) ([]Fact, error)

	// Do runs one command of the hot path.
	Do(ctx context.Context, cmd Command) (Result, error)

	// Close logs out and unloads. No method may be called after it.
	Close() error
}

// KeyID names a key on every member of a group: 16 random bytes, chosen by the
// core and kept in CKA_ID.
type KeyID [16]byte

// String returns the identity as 32 hexadecimal digits.
func (id KeyID) String() string { return hex.EncodeToString(id[:]) }

// ParseKeyID reads what String wrote.
func ParseKeyID(s string) (KeyID, error) {
	var id KeyID
	if len(s) != hex.EncodedLen(len(id)) {
		return KeyID{}, fmt.Errorf("parsing key identity %q: want 32 hexadecimal digits", s)
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return KeyID{}, fmt.Errorf("parsing key identity %q: %w", s, err)
	}
	return id, nil
}

// KeyType says what a key is. The set is closed.
type KeyType string

const (
	AES128     KeyType = "aes-128"
	AES256     KeyType = "aes-256"
	RSA2048    KeyType = "rsa-2048"
	RSA3072    KeyType = "rsa-3072"
	RSA4096    KeyType = "rsa-4096"
	ECP256     KeyType = "ec-p256"
	ECP384     KeyType = "ec-p384"
	ECP521     KeyType = "ec-p521"
	HMACSHA256 KeyType = "hmac-sha256"
)

// KeyTypes lists every key type, in the order in which documents show them.
func KeyTypes() []KeyType {
	return []KeyType{AES256, AES128, RSA2048, RSA3072, RSA4096, ECP256, ECP384, ECP521, HMACSHA256}
}

// Symmetric reports whether the key is a single secret key, not a pair.
func (t KeyType) Symmetric() bool { return t == AES128 || t == AES256 || t == HMACSHA256 }

// OpenRequest is all that a driver learns at start.
type OpenRequest struct {
	// Settings are the member's settings from the configuration, by name
	// (module, token_label, ...). A name the driver does not know is an error.
	Settings map[string]string

	// PIN logs the driver in. The driver keeps its own copy for one re-login and
	// wipes it in Close; the caller wipes this one.
	PIN []byte

	// Domain is the group's domain secret, at least 32 random bytes, from which
	// every token of the group derives the same domain key.
	Domain []byte
}

// TokenInfo describes the token a driver has opened.
type TokenInfo struct {
	Label, Serial, Manufacturer, Model, Firmware string

	// DomainCheck is the check value of the domain key. Members of one group
	// have equal ones.
	DomainCheck []byte

	// Driver is the driver's name and version, for status.
	Driver string

	// Mechanisms are those that the token offers, in ascending order. Nil: it does not
	// say.
	Mechanisms []Mechanism

	// Cloning is how keys leave the token and come to it, the best way first. A driver
	// whose keys stay where they are has none.
	Cloning []CloneProtocol

	// Facts are what an operator should know of the token besides.
	Facts []Fact
}

// Fact is one thing to know of a token: how much room it has, whether it is activated,
// what its library lacks.
type Fact struct {
	Name, Value string
	// Warning says that somebody has to act before it becomes a failure.
	Warning bool
}

// KeySpec says what key to make.
type KeySpec struct {
	ID    KeyID
	Type  KeyType
	Label string // CKA_LABEL, for a person with a PKCS#11 browser; never used to find a key
}

// Object is one key as it is on one token.
type Object struct {
	ID    KeyID
	Type  KeyType
	Label string

	// CheckValue is computed inside the HSM: 8 bytes of an encryption (AES) or a
	// MAC (HMAC) of a fixed, labelled block, or 8 bytes of SHA-256 of Public.
	// Equal keys have equal check values on every token.
	CheckValue []byte

	// Public is the public half as DER SubjectPublicKeyInfo, nil for secret keys.
	Public []byte
}

// Attributes are what SetAttributes changes. A nil field is left as it is.
type Attributes struct {
	Label *string
}

// Op is what a command does.
type Op uint8

const (
	OpEncrypt Op = iota + 1 // AESGCM: Input → ciphertext ‖ 16-byte tag
	OpDecrypt               // AESGCM: ciphertext ‖ tag → plaintext; RSAOAEP: ciphertext → plaintext
	OpSign                  // Input is the digest made with Hash → signature (ECDSA: r ‖ s)
	OpVerify                // Input is the digest (HMAC: the message), Signature what to check
	OpMAC                   // HMAC: Input is the message → MAC
	OpRandom                // Length bytes from the token's random source
	OpProbe                 // a wrap and unwrap round trip under a session key of the driver's own
)

// Mechanism is how it is done. The set is closed.
type Mechanism uint8

const (
	NoMechanism Mechanism = iota // random, probe
	AESGCM                       // IV of 12 or 16 bytes, tag of 16
	RSAPKCS1v15
	RSAPSS // salt as long as the hash
	RSAOAEP
	ECDSA
	HMAC
)

// String returns the mechanism's name.
func (m Mechanism) String() string {
	switch m {
	case AESGCM:
		return "AES-GCM"
	case RSAPKCS1v15:
		return "RSA PKCS #1 v1.5"
	case RSAPSS:
		return "RSA PSS"
	case RSAOAEP:
		return "RSA OAEP"
	case ECDSA:
		return "ECDSA"
	case HMAC:
		return "HMAC"
	default:
		return "no mechanism"
	}
}

// Hash is the digest a signature or an OAEP padding is made with.
type Hash uint8

const (
	NoHash Hash = iota
	SHA256
	SHA384
	SHA512
)

// Command is one operation of the hot path. It is idempotent: the same command
// on any member that holds the key gives an answer that is as good.
type Command struct {
	Op        Op
	Key       KeyID
	Mech      Mechanism
	Hash      Hash
	Input     []byte
	IV        []byte // AESGCM: GCMIVSize bytes that the caller chose, never twice for one key; to decrypt, what was used
	AAD       []byte
	Signature []byte
	Length    int // OpRandom: bytes wanted, 1 to 64 KiB

	// Items, with AESGCM only, are 1 to MaxItems of the same under one key, each in
	// place of Input, IV and AAD: whoever has thousands of small ones saves most of what
	// a command costs beside the HSM. Together they keep the limits of one.
	Items []Item
}

// Item is one of many that a command does.
type Item struct {
	Input, IV, AAD []byte
}

// Wipe clears the inputs, which may be plaintext.
func (c Command) Wipe() {
	clear(c.Input)
	for _, it := range c.Items {
		clear(it.Input)
	}
}

// Result is the answer to a command.
type Result struct {
	// Output is the receiver's, to wipe after use: a driver keeps no reference to it,
	// and it shares no memory with the command.
	Output []byte
	// IV is the one that was used to encrypt, of GCMIVSize or GCMLongIVSize bytes. A token
	// that insists on its own (FIPS) differs from Command.IV here, and in what it answers
	// to the same command the next time.
	IV []byte
	// Items are the answers to Command.Items, in their order.
	Items []ItemResult
}

// ItemResult is the answer to one item, as in Result.
type ItemResult struct {
	Output, IV []byte
	// Err is what is wrong with this item, always of ClassCaller: what is wrong with the
	// key or the token fails the command.
	Err error
}

// Wipe clears the outputs, which may be plaintext.
func (r Result) Wipe() {
	clear(r.Output)
	for _, it := range r.Items {
		clear(it.Output)
	}
}
