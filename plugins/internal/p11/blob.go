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
	typ, ok := blobTypes[b.object.Type]
	if !ok || len(b.object.CheckValue) != checkValueSize {
		return nil, errors.New("the key has no type or no check value that a blob can carry")
	}
	out := make([]byte, 0, blobHeader+len(b.object.Label)+len(b.object.Public)+len(b.wrapped)+6+blobMAC)
	out = append(out, blobMagic...)
	out = append(out, blobVersion)
	out = append(out, b.transfer[:]...)
	out = append(out, b.object.ID[:]...)
	out = append(out, typ)
	out = append(out, b.object.CheckValue...)
	for _, part := range []struct {
		bytes []byte
		limit int
	}{{[]byte(b.object.Label), pluginproto.MaxLabel}, {b.object.Public, maxSPKI}, {b.wrapped, maxWrapped}} {
		if len(part.bytes) > part.limit {
			return nil, fmt.Errorf("a part of %d bytes is longer than a blob carries, %d", len(part.bytes), part.limit)
		}
		out = binary.BigEndian.AppendUint16(out, uint16(len(part.bytes)))
		out = append(out, part.bytes...)
	}
	return append(out, d.sum(out)...), nil
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
	copy(b.object.ID[:], r.take(16))
	number := r.take(1)
	b.object.CheckValue = slices.Clone(r.take(checkValueSize))
	b.object.Label = string(r.part(pluginproto.MaxLabel))
	b.object.Public = slices.Clone(r.part(maxSPKI))
	b.wrapped = slices.Clone(r.part(maxWrapped))
	if r.rest == nil || len(r.rest) != 0 || len(b.wrapped) == 0 {
		return nil, fmt.Errorf("%w: its lengths do not add up", errBlob)
	}
	for t, n := range blobTypes {
		if n == number[0] {
			b.object.Type = t
		}
	}
	if b.object.Type == "" {
		return nil, fmt.Errorf("the blob has key type %d, which this driver does not know", number[0])
	}
	if b.object.Type.Symmetric() {
		if len(b.object.Public) != 0 {
			return nil, fmt.Errorf("%w: it has a public half for a secret key", errBlob)
		}
		b.object.Public = nil
	} else if _, err := parsePublic(b.object.Public, b.object.Type); err != nil {
		return nil, err
	}
	return &b, nil
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
