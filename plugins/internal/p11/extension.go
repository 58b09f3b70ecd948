package p11

import (
	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// Extension is what a kind of HSM can do beside PKCS#11, through functions of its own in
// the same library. There is one for each connection. The engine calls it on its workers,
// under the lock that every call into the library needs, and not before C_Initialize.
// Its errors carry return values as pkcs11.Error, or are the contract's own.
type Extension interface {
	// Prepare is called before the first session is opened and before anybody logs in.
	Prepare() error

	// Describe completes what is said of the token once a session is logged in: the
	// firmware, the protocols by which keys leave the token and come to it, facts. An error
	// means that the token cannot serve.
	Describe(at Place, info *pluginproto.TokenInfo) error

	// Facts returns the facts as they are now.
	Facts(at Place) ([]pluginproto.Fact, error)

	// UID returns what the HSM knows an object by, which outlives cloning; nil when it
	// does not say. It has at most MaxUID bytes.
	UID(at Place, object pkcs11.ObjectHandle) ([]byte, error)

	// ByUID returns the object on the token that the HSM knows by uid; false when there is
	// none, or when the HSM cannot look for it so.
	ByUID(at Place, uid []byte) (object pkcs11.ObjectHandle, found bool, err error)

	// Source and Target begin one end of a transfer, for so many objects. The session is
	// the transfer's own: nothing else is done in it, and the engine closes it after Close.
	Source(protocol string, at Place, objects int) (Source, error)
	Target(protocol string, at Place, objects int) (Target, error)
}

// Place is where a call goes.
type Place struct {
	Slot    uint
	Session pkcs11.SessionHandle
}

const (
	// MaxPayload is the most that a step of a Source or a Target may say, in bytes. The
	// rest of a blob is the engine's.
	MaxPayload = pluginproto.MaxBlob - 160<<10
	// MaxUID is the longest name that an HSM has for an object, in bytes.
	MaxUID = 64
)

// Source is the end of a transfer that gives secret objects away. Its methods are called
// one at a time.
type Source interface {
	// Step takes what the target has said, nil at first, and returns what to tell it. give
	// are the objects that the target wants; it is nil before the target has said so, and
	// all objects where the protocol is done in one step. One that cannot leave the token
	// is for the protocol to tell the target, so that the others go on. After an error
	// nothing but Close is called.
	Step(in []byte, give []pkcs11.ObjectHandle) (out []byte, done bool, err error)
	// Close lets go of what the HSM keeps for the transfer.
	Close()
}

// Target is the end that takes them.
type Target interface {
	// Step takes what the source has said. With done, received has the object that each of
	// the source's became, in their order. After an error nothing but Close is called;
	// objects that came before it are in received, and the engine destroys them.
	Step(in []byte) (out []byte, received []Received, done bool, err error)
	// Due reports whether objects may come with the next step.
	Due() bool
	// Close lets go of what the HSM keeps for the transfer; objects that were received stay.
	Close()
}

// Received is an object that came to the token, or why it did not.
type Received struct {
	Object pkcs11.ObjectHandle
	Err    error
}

// Codes say what a vendor's own return values mean. A return value of PKCS#11 may be
// among them, and then counts before the engine's table.
type Codes map[uint]Code // :: return value → meaning

// Code is what a return value means.
type Code struct {
	Class     pluginproto.Class
	Permanent bool   // trying again does not mend it
	Hint      string // what to do about it; may be empty

	// Gone says that it may mean that the session, the login or a handle is no more: the
	// connection is looked at, made anew if it is lost, and the call tried again.
	Gone bool
	// Exists says that an object that was to be received is on the token already.
	Exists bool
}
