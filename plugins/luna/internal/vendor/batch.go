package vendor

// #include "vendor.h"
import "C"

import (
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// MaxObjects is how many objects one call of [Library.Extract] or [Library.Insert] takes.
const MaxObjects = C.MAX_OBJECTS

// Blob is what an object is while it travels.
type Blob struct {
	Bytes []byte
	Err   error // why the object cannot leave, a pkcs11.Error
}

// notAttempted marks objects that a call has said nothing of.
const notAttempted pkcs11.Error = 0x80000107 // CKR_CLONE_NOT_ATTEMPTED

// someFailed is the answer of a call some of whose objects failed.
const someFailed pkcs11.Error = 0x80000106 // CKR_FAILED_TO_CLONE_AN_OBJECT

// Extract gives objects into a tunnel. input is what the source said last when the tunnel was
// negotiated. What is wrong with one object does not keep the others from leaving.
func (l *Library) Extract(h pkcs11.SessionHandle, input, tunnel []byte, objects []pkcs11.ObjectHandle) ([]Blob, error) {
	f, err := l.need(Extract)
	if err != nil {
		return nil, err
	}
	b, err := newBatch(Extract, input, tunnel, len(objects))
	if err != nil {
		return nil, err
	}
	b.each = maxProtocolBuffer
	for i, o := range objects {
		b.objects[i], b.sizes[i] = C.ulong_t(o), maxProtocolBuffer
	}
	room := make([]byte, len(objects)*maxProtocolBuffer)
	err = check(Extract, C.ca_extract(f, C.ulong_t(h), b, pointer(input), pointer(tunnel), pointer(room)))
	if err != nil && !errors.Is(err, someFailed) {
		return nil, err
	}
	out := make([]Blob, len(objects))
	for i := range out {
		size := uint(b.sizes[i])
		switch {
		case b.results[i] != pkcs11.CKR_OK:
			out[i].Err = pkcs11.Error(b.results[i])
		case size == 0 || size > maxProtocolBuffer:
			return nil, fmt.Errorf("%s says that it wrote %d bytes where there is room for %d: %w", Extract, size, maxProtocolBuffer, pkcs11.Error(pkcs11.CKR_GENERAL_ERROR))
		default:
			out[i].Bytes = room[i*maxProtocolBuffer:][:size:size]
		}
	}
	return out, nil
}

// Arrival is what became of a blob.
type Arrival struct {
	Object pkcs11.ObjectHandle
	Err    error // a pkcs11.Error
}

// Insert takes objects from a tunnel onto the token. input is what the source said last when
// it was negotiated.
func (l *Library) Insert(h pkcs11.SessionHandle, input, tunnel []byte, blobs [][]byte) ([]Arrival, error) {
	f, err := l.need(Insert)
	if err != nil {
		return nil, err
	}
	b, err := newBatch(Insert, input, tunnel, len(blobs))
	if err != nil {
		return nil, err
	}
	var all []byte
	for i, blob := range blobs {
		b.sizes[i] = C.ulong_t(len(blob))
		all = append(all, blob...)
	}
	err = check(Insert, C.ca_insert(f, C.ulong_t(h), b, pointer(input), pointer(tunnel), pointer(all)))
	if err != nil && !errors.Is(err, someFailed) {
		return nil, err
	}
	out := make([]Arrival, len(blobs))
	for i := range out {
		if b.results[i] != pkcs11.CKR_OK {
			out[i].Err = pkcs11.Error(b.results[i])
			continue
		}
		out[i].Object = pkcs11.ObjectHandle(b.objects[i])
	}
	return out, nil
}

func newBatch(f Function, input, tunnel []byte, n int) (*C.struct_batch, error) {
	if n < 1 || n > MaxObjects {
		return nil, fmt.Errorf("%s for %d objects, between 1 and %d are possible: %w", f, n, MaxObjects, pkcs11.Error(pkcs11.CKR_ARGUMENTS_BAD))
	}
	b := &C.struct_batch{input_size: C.ulong_t(len(input)), tunnel_size: C.ulong_t(len(tunnel)), n: C.ulong_t(n)}
	for i := range n {
		b.results[i] = C.ulong_t(notAttempted)
	}
	return b, nil
}

// SIMExtract makes a blob of an object, which stays where it is.
func (l *Library) SIMExtract(h pkcs11.SessionHandle, object pkcs11.ObjectHandle) ([]byte, error) {
	f, err := l.need(SIMExtract)
	if err != nil {
		return nil, err
	}
	return output(SIMExtract, func(out *C.byte_t, n *C.ulong_t) C.ulong_t {
		return C.ca_sim_extract(f, C.ulong_t(h), C.ulong_t(object), out, n)
	})
}

// SIMInsert makes an object of a blob that holds one.
func (l *Library) SIMInsert(h pkcs11.SessionHandle, blob []byte) (pkcs11.ObjectHandle, error) {
	f, err := l.need(SIMInsert)
	if err != nil {
		return 0, err
	}
	var objects [MaxObjects]C.ulong_t
	count := C.ulong_t(MaxObjects)
	if err := check(SIMInsert, C.ca_sim_insert(f, C.ulong_t(h), pointer(blob), C.ulong_t(len(blob)), &count, &objects[0])); err != nil {
		return 0, err
	}
	if count != 1 {
		return 0, fmt.Errorf("%s made %d objects of a blob that should hold one: %w", SIMInsert, count, pkcs11.Error(pkcs11.CKR_GENERAL_ERROR))
	}
	return pkcs11.ObjectHandle(objects[0]), nil
}
