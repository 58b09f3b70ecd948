package p11

import (
	"time"

	"github.com/miekg/pkcs11"
	"github.com/pkg/errors"

	"kmsd/pluginproto"
)

// What tests do behind the driver's back, through the library it uses. They take
// the lock as a call of the driver's own would: SoftHSM does not survive losing a
// session that a call is using, and a real device has a lock of its own there.

// CloseAllSessions takes all sessions away, as a reboot of the HSM does.
func (d *Driver) CloseAllSessions() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.conn.lib.CloseAllSessions(d.conn.place.slot)
}

// Logout takes the login away and leaves the sessions.
func (d *Driver) Logout() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.conn.lib.Logout(d.conn.keeper)
}

// Raw runs f with the library and a session of the driver's.
func (d *Driver) Raw(f func(*pkcs11.Ctx, pkcs11.SessionHandle) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return f(d.conn.lib, d.conn.keeper)
}

// Forget forgets all handles, as a command does whose key is gone.
func (d *Driver) Forget() {
	d.mu.RLock()
	defer d.mu.RUnlock()
	d.conn.forget()
}

// SetPIN replaces the PIN that the driver keeps for a new login.
func (d *Driver) SetPIN(pin string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.secrets.pin = []byte(pin)
}

// Wiped reports whether the secrets are gone from memory.
func (d *Driver) Wiped() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, secret := range [][]byte{d.secrets.pin, d.secrets.domain.kek, d.secrets.domain.mac} {
		for _, b := range secret {
			if b != 0 {
				return false
			}
		}
	}
	return true
}

var (
	CheckPIN  = checkPIN
	UnpadOAEP = unpadOAEP
)

// ClassifyBy returns the contract's error for a return value where a vendor has codes.
func ClassifyBy(codes Codes, ckr uint) error { return codes.fail("testing", pkcs11.Error(ckr)) }

// Classify returns the contract's error for a return value.
func Classify(ckr uint) error { return Codes(nil).fail("testing", pkcs11.Error(ckr)) }

// Domain is the keys of a domain secret.
type Domain = domain

var (
	NewDomain  = newDomain
	DecodeBlob = decodeBlob
	ParseBlob  = parseBlob
)

// Blob is a clone blob to be written.
type Blob = blob

// NewBlob makes one.
func NewBlob(transfer [16]byte, o pluginproto.Object, wrapped []byte) *Blob {
	return &blob{transfer: transfer, object: o, wrapped: wrapped}
}

// Encode writes a blob.
func (b *blob) Encode(d *Domain) ([]byte, error) { return b.encode(d) }

// Parts returns what a blob carries.
func (b *blob) Parts() ([16]byte, pluginproto.Object, []byte) { return b.transfer, b.object, b.wrapped }

// Sum is the MAC of a blob's body.
func (d *domain) Sum(body []byte) []byte { return d.sum(body) }

// Check is what tells domains apart.
func (d *domain) Check() []byte { return d.check }

// ClassifyWrapped is Classify for an error that crypto11 has wrapped.
func ClassifyWrapped(ckr uint) error {
	return Codes(nil).fail("testing", errors.WithMessage(pkcs11.Error(ckr), "failed to destroy key"))
}

// IVUse is how a token treats IVs, as it was recognised from an answer.
type IVUse = ivUse

var RecogniseIV = recognise

// Give and Split are what seal does with it.
func (u IVUse) Give(iv []byte) []byte { return u.give(iv) }

func (u IVUse) Split(out, param []byte, n int) (sealed, iv []byte, ok bool) {
	return u.split(out, param, n)
}

// SetIdle sets how long a transfer waits for its next step; before Open.
func (d *Driver) SetIdle(idle time.Duration) { d.idle = idle }

// Transfers is how many transfers wait for their next step.
func (d *Driver) Transfers() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.conn.transfers)
}

// Age makes all transfers older.
func (d *Driver) Age(by time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, t := range d.conn.transfers {
		t.used = t.used.Add(-by)
	}
}

// MaxTransfers is how many transfers wait at a time.
const MaxTransfers = maxTransfers

// Frame is what one end of a transfer says, with its place.
type Frame struct {
	Role     pluginproto.CloneRole
	Step     int
	Transfer [16]byte
	Protocol string
	Payload  []byte
}

// Encode writes a frame.
func (f Frame) Encode(d *Domain) ([]byte, error) {
	inner := frame{f.Role, f.Step, f.Transfer, f.Protocol, f.Payload}
	return inner.encode(d)
}

func exported(f *frame, err error) (Frame, error) {
	if err != nil {
		return Frame{}, err
	}
	return Frame{f.role, f.step, f.transfer, f.protocol, f.payload}, nil
}

// DecodeFrame reads a frame, ParseFrame one without its MAC.
func DecodeFrame(d *Domain, in []byte) (Frame, error) { return exported(decodeFrame(d, in)) }
func ParseFrame(body []byte) (Frame, error)           { return exported(parseFrame(body)) }

// Offer is a key as a source describes it; without a type it is not given.
type Offer struct {
	Object pluginproto.Object
	UID    []byte
}

// AppendOffer writes what a source offers.
func AppendOffer(keys []pluginproto.KeyID, all []Offer) ([]byte, error) {
	inner := make([]offered, len(all))
	for i, o := range all {
		inner[i] = offered{o.Object, o.UID}
	}
	return appendOffer(nil, keys, inner)
}

// ParseOffer reads it.
func ParseOffer(in []byte, keys []pluginproto.KeyID) (out []Offer, rest []byte, err error) {
	all, rest, err := parseOffer(in, keys)
	for _, o := range all {
		out = append(out, Offer{o.object, o.uid})
	}
	return out, rest, err
}

var (
	AppendWants = appendWants
	ParseWants  = parseWants
)
