package p11

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"kmsd/pluginproto"
)

// A clone blob, version 1. Numbers are big endian.
//
//	offset  size
//	     0     4  "KMCB"
//	     4     1  format version, 1
//	     5    16  transfer
//	    21    16  key identity
//	    37     1  key type, see blobTypes
//	    38     8  check value
//	    46     2  L, length of the label, at most 1024
//	    48     L  label
//	           2  P, length of the public half, 0 for secret keys
//	           P  public half, DER SubjectPublicKeyInfo
//	           2  W, length of the wrapped key
//	           W  the secret or private key, wrapped with AES-KWP (RFC 5649) under the domain key
//	          32  HMAC-SHA256 over all that is before it, under the domain's MAC key
const (
	blobMagic   = "KMCB"
	blobVersion = 1
	blobHeader  = len(blobMagic) + 1 + 16 + 16 + 1 + checkValueSize
	blobMAC     = sha256.Size

	maxSPKI    = 1024     // bytes; RSA-4096 takes 550
	maxWrapped = 4 << 10  // bytes; RSA-4096 takes 2,400
	maxBlob    = 16 << 10 // bytes
)

// blobTypes numbers the key types in a blob. A number is never used again.
var blobTypes = map[pluginproto.KeyType]byte{
	pluginproto.AES128: 1, pluginproto.AES256: 2, pluginproto.HMACSHA256: 3,
	pluginproto.RSA2048: 4, pluginproto.RSA3072: 5, pluginproto.RSA4096: 6,
	pluginproto.ECP256: 7, pluginproto.ECP384: 8, pluginproto.ECP521: 9,
}

// blob is a key on its way from one token to another.
type blob struct {
	transfer [16]byte
	object   pluginproto.Object
	wrapped  []byte
}

func (b *blob) encode(d *domain) ([]byte, error) {
	out := make([]byte, 0, blobHeader+len(b.object.Label)+len(b.object.Public)+len(b.wrapped)+6+blobMAC)
	out = append(out, blobMagic...)
	out = append(out, blobVersion)
	out = append(out, b.transfer[:]...)
	out, err := appendObject(out, b.object)
	if err != nil {
		return nil, err
	}
	if len(b.wrapped) > maxWrapped {
		return nil, fmt.Errorf("a wrapped key of %d bytes is longer than a blob carries, %d", len(b.wrapped), maxWrapped)
	}
	out = appendPart(out, b.wrapped)
	return append(out, d.sum(out)...), nil
}

// appendObject writes a key's identity, type, check value, label and public half.
func appendObject(out []byte, o pluginproto.Object) ([]byte, error) {
	typ, ok := blobTypes[o.Type]
	if !ok || len(o.CheckValue) != checkValueSize {
		return nil, errors.New("the key has no type or no check value that a blob can carry")
	}
	if len(o.Label) > pluginproto.MaxLabel || len(o.Public) > maxSPKI {
		return nil, fmt.Errorf("a label of %d or a public half of %d bytes is longer than a blob carries", len(o.Label), len(o.Public))
	}
	out = append(out, o.ID[:]...)
	out = append(out, typ)
	out = append(out, o.CheckValue...)
	return appendPart(appendPart(out, []byte(o.Label)), o.Public), nil
}

// appendPart writes bytes behind their number, which fits in two.
func appendPart(out, part []byte) []byte {
	return append(binary.BigEndian.AppendUint16(out, uint16(len(part))), part...)
}

var errBlob = errors.New("it is damaged, or comes from a token of another domain")

// decodeBlob reads a blob. Nothing in it is believed before its MAC is checked.
func decodeBlob(d *domain, in []byte) (*blob, error) {
	if len(in) > maxBlob || len(in) < blobHeader+blobMAC {
		return nil, fmt.Errorf("%w: it has %d bytes", errBlob, len(in))
	}
	body, mac := in[:len(in)-blobMAC], in[len(in)-blobMAC:]
	if !hmac.Equal(mac, d.sum(body)) {
		return nil, errBlob
	}
	return parseBlob(body)
}

// parseBlob reads what is before the MAC.
func parseBlob(body []byte) (*blob, error) {
	r := reader{body}
	if magic := r.take(len(blobMagic)); string(magic) != blobMagic {
		return nil, fmt.Errorf("%w: it does not begin as a clone blob", errBlob)
	}
	if v := r.take(1); len(v) == 1 && v[0] != blobVersion {
		return nil, fmt.Errorf("the blob has format version %d, this driver knows %d", v[0], blobVersion)
	}
	var b blob
	copy(b.transfer[:], r.take(16))
	var err error
	if b.object, err = r.object(); err != nil {
		return nil, err
	}
	b.wrapped = slices.Clone(r.part(maxWrapped))
	if r.rest == nil || len(r.rest) != 0 || len(b.wrapped) == 0 {
		return nil, fmt.Errorf("%w: its lengths do not add up", errBlob)
	}
	return &b, nil
}

// object reads what appendObject wrote.
func (r *reader) object() (o pluginproto.Object, err error) {
	copy(o.ID[:], r.take(16))
	number := r.take(1)
	o.CheckValue = slices.Clone(r.take(checkValueSize))
	o.Label = string(r.part(pluginproto.MaxLabel))
	o.Public = slices.Clone(r.part(maxSPKI))
	if r.rest == nil {
		return o, fmt.Errorf("%w: its lengths do not add up", errBlob)
	}
	for t, n := range blobTypes {
		if n == number[0] {
			o.Type = t
		}
	}
	if o.Type == "" {
		return o, fmt.Errorf("the blob has key type %d, which this driver does not know", number[0])
	}
	if o.Type.Symmetric() {
		if len(o.Public) != 0 {
			return o, fmt.Errorf("%w: it has a public half for a secret key", errBlob)
		}
		o.Public = nil
		return o, nil
	}
	_, err = parsePublic(o.Public, o.Type)
	return o, err
}

// reader takes bytes off the front. After a take that is too long, rest is nil
// and all takes give nothing.
type reader struct{ rest []byte }

func (r *reader) take(n int) []byte {
	if r.rest == nil || len(r.rest) < n {
		r.rest = nil
		return nil
	}
	out := r.rest[:n:n]
	r.rest = r.rest[n:]
	return out
}

func (r *reader) part(limit int) []byte {
	size := r.take(2)
	if size == nil || int(binary.BigEndian.Uint16(size)) > limit {
		r.rest = nil
		return nil
	}
	return r.take(int(binary.BigEndian.Uint16(size)))
}
