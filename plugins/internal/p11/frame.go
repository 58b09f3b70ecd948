package p11

import (
	"bytes"
	"crypto/hmac"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"kmsd/pluginproto"
)

// A frame is what one end of a transfer says to the other where an extension clones:
// the extension's own words, bound to where they belong, so that nothing else reaches an
// HSM. Version 1; numbers are big endian.
//
//	offset  size
//	     0     4  "KMCF"
//	     4     1  format version, 1
//	     5     1  who says it: 1 the source, 2 the target
//	     6     1  at which of its steps
//	     7    16  transfer
//	    23     2  P, length of the protocol's name, at most 32
//	    25     P  protocol
//	           N  payload
//	          32  HMAC-SHA256 over all that is before it, under the domain's MAC key
//
// The source's payload of step 0 begins with what it offers, the target's with what it
// wants of that; all other payloads are the extension's.
type frame struct {
	role     pluginproto.CloneRole
	step     int
	transfer [16]byte
	protocol string
	payload  []byte
}

const (
	frameMagic   = "KMCF"
	frameVersion = 1

	maxProtocolName = 32       // bytes
	maxFrameStep    = 1<<8 - 1 // the longest protocol in use has 3
)

func (f *frame) encode(d *domain) ([]byte, error) {
	if len(f.protocol) > maxProtocolName || f.step < 0 || f.step > maxFrameStep {
		return nil, fmt.Errorf("there is no frame for step %d of %q", f.step, f.protocol)
	}
	out := make([]byte, 0, 32+len(f.protocol)+len(f.payload)+blobMAC)
	out = append(out, frameMagic...)
	out = append(out, frameVersion, byte(f.role), byte(f.step))
	out = append(out, f.transfer[:]...)
	out = appendPart(out, []byte(f.protocol))
	out = append(out, f.payload...)
	out = append(out, d.sum(out)...)
	if len(out) > pluginproto.MaxBlob {
		return nil, fmt.Errorf("it takes %d bytes to say, at most %d are possible", len(out), pluginproto.MaxBlob)
	}
	return out, nil
}

// decodeFrame reads a frame. Nothing in it is believed before its MAC is checked.
func decodeFrame(d *domain, in []byte) (*frame, error) {
	if len(in) > pluginproto.MaxBlob || len(in) < blobMAC {
		return nil, fmt.Errorf("%w: it has %d bytes", errBlob, len(in))
	}
	body, mac := in[:len(in)-blobMAC], in[len(in)-blobMAC:]
	if !hmac.Equal(mac, d.sum(body)) {
		return nil, errBlob
	}
	return parseFrame(body)
}

// parseFrame reads what is before the MAC. The payload is not copied.
func parseFrame(body []byte) (*frame, error) {
	r := reader{body}
	if magic := r.take(len(frameMagic)); string(magic) != frameMagic {
		return nil, fmt.Errorf("%w: it does not begin as a clone frame", errBlob)
	}
	if v := r.take(1); len(v) == 1 && v[0] != frameVersion {
		return nil, fmt.Errorf("the frame has format version %d, this driver knows %d", v[0], frameVersion)
	}
	where := r.take(2)
	var f frame
	copy(f.transfer[:], r.take(16))
	f.protocol = string(r.part(maxProtocolName))
	if r.rest == nil {
		return nil, fmt.Errorf("%w: its lengths do not add up", errBlob)
	}
	f.role, f.step, f.payload = pluginproto.CloneRole(where[0]), int(where[1]), r.rest
	return &f, nil
}

// openFrame reads what the other end has answered to its step, and makes sure that it was
// said for this one.
func openFrame(d *domain, req pluginproto.CloneRequest) ([]byte, error) {
	f, err := decodeFrame(d, req.Blob)
	if err != nil {
		return nil, fmt.Errorf("reading the blob: %w", err)
	}
	giver, step := pluginproto.CloneSource, req.Step
	if req.Role == pluginproto.CloneSource {
		giver, step = pluginproto.CloneTarget, req.Step-1
	}
	switch {
	case f.transfer != req.Transfer:
		return nil, errors.New("the blob belongs to another transfer")
	case f.protocol != req.Protocol:
		return nil, fmt.Errorf("the blob belongs to the protocol %q", f.protocol)
	case f.role != giver || f.step != step:
		return nil, fmt.Errorf("the blob was said by another end or at another step (%d, step %d)", f.role, f.step)
	}
	return f.payload, nil
}

// offered is a key as the source describes it. One without a type is not given.
type offered struct {
	object pluginproto.Object
	uid    []byte // what the source's HSM calls the secret or private object; nil: it does not say
}

func (o offered) given() bool { return o.object.Type != "" }

// An offer is, before the extension's first words:
//
//	   2  K, the number of keys
//	K ×   1  1 when the key is given, else 0, and then nothing follows but its identity
//	     16  key identity
//	         key type, check value, label, public half as in a blob
//	         2  U, length of what the source's HSM calls the object, at most 64
//	         U
func appendOffer(out []byte, keys []pluginproto.KeyID, all []offered) ([]byte, error) {
	out = binary.BigEndian.AppendUint16(out, uint16(len(keys)))
	for i, o := range all {
		if !o.given() {
			out = append(append(out, 0), keys[i][:]...)
			continue
		}
		var err error
		if out, err = appendObject(append(out, 1), o.object); err != nil {
			return nil, err
		}
		if len(o.uid) > MaxUID {
			return nil, fmt.Errorf("the HSM's name for an object has %d bytes, at most %d are possible", len(o.uid), MaxUID)
		}
		out = appendPart(out, o.uid)
	}
	return out, nil
}

// parseOffer reads an offer of these keys and returns what is behind it.
func parseOffer(payload []byte, keys []pluginproto.KeyID) ([]offered, []byte, error) {
	r := reader{payload}
	if n := r.take(2); n == nil || int(binary.BigEndian.Uint16(n)) != len(keys) {
		return nil, nil, fmt.Errorf("the source offers other keys than the %d of this transfer", len(keys))
	}
	all := make([]offered, len(keys))
	for i, id := range keys {
		given := r.take(1)
		if r.rest == nil || given[0] > 1 {
			return nil, nil, fmt.Errorf("%w: its lengths do not add up", errBlob)
		}
		if given[0] == 0 {
			if other := r.take(len(id)); !bytes.Equal(other, id[:]) {
				return nil, nil, fmt.Errorf("the source offers the key %x where %s was asked for", other, id)
			}
			continue
		}
		o, err := r.object()
		if err != nil {
			return nil, nil, err
		}
		if o.ID != id {
			return nil, nil, fmt.Errorf("the source offers the key %s where %s was asked for", o.ID, id)
		}
		all[i] = offered{object: o, uid: slices.Clone(r.part(MaxUID))}
	}
	if r.rest == nil {
		return nil, nil, fmt.Errorf("%w: its lengths do not add up", errBlob)
	}
	return all, r.rest, nil
}

// What a target wants is one byte for each key, 1 or 0, before the extension's first words.
func appendWants(out []byte, keys int, wanted []int) []byte {
	wants := make([]byte, keys)
	for _, i := range wanted {
		wants[i] = 1
	}
	return append(out, wants...)
}

// parseWants reads which keys are wanted and returns what is behind it.
func parseWants(payload []byte, keys int) (wanted []int, rest []byte, err error) {
	r := reader{payload}
	wants := r.take(keys)
	if r.rest == nil {
		return nil, nil, fmt.Errorf("%w: its lengths do not add up", errBlob)
	}
	for i, w := range wants {
		switch w {
		case 0:
		case 1:
			wanted = append(wanted, i)
		default:
			return nil, nil, fmt.Errorf("%w: it does not say what is wanted", errBlob)
		}
	}
	return wanted, r.rest, nil
}
