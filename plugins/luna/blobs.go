package main

import (
	"errors"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/internal/vendor"
)

// Protocols that carry many objects say [return value, blob] for each of them, in order.

// tooLarge stands for a return value, where a blob did not fit beside the others. No library
// answers it.
const tooLarge = 1<<64 - 1

func packBlobs(blobs []vendor.Blob) []byte {
	fields := make([][]byte, 0, 2*len(blobs))
	room := p11.MaxPayload - len(blobs)*(4+8+4)
	for _, b := range blobs {
		rv := uint(pkcs11.CKR_OK)
		switch {
		case b.Err != nil:
			rv, b.Bytes = ckrOf(b.Err), nil
		case len(b.Bytes) > room:
			rv, b.Bytes = tooLarge, nil
		}
		room -= len(b.Bytes)
		fields = append(fields, number(rv), b.Bytes)
	}
	return pack(fields...)
}

// unpackBlobs reads what packBlobs wrote for n objects: the blobs that came, and for each
// object why its blob did not.
func unpackBlobs(in []byte, n int) (received []p11.Received, blobs [][]byte, err error) {
	fields, err := unpackN(in, 2*n)
	if err != nil {
		return nil, nil, err
	}
	received = make([]p11.Received, n)
	for i := range received {
		rv, err := numberOf(fields[2*i])
		blob := fields[2*i+1]
		if err != nil || (rv == pkcs11.CKR_OK) != (len(blob) > 0) {
			return nil, nil, unreadable()
		}
		if rv != pkcs11.CKR_OK {
			received[i].Err = withholds(rv)
			continue
		}
		blobs = append(blobs, blob)
	}
	return received, blobs, nil
}

// withholds says why the source did not give an object. It must not look like a failure of the
// HSM that was to receive it.
func withholds(rv uint) error {
	e := &pluginproto.Error{Class: pluginproto.ClassUnknown, CKR: rv, Op: "taking a key from the other HSM", Msg: "that one does not give it away"}
	if rv == tooLarge {
		e.Class, e.CKR = pluginproto.ClassBusy, pluginproto.CKROK
		e.Msg = "it does not fit into one message with the others; it goes alone"
		return e
	}
	if code, ok := codes[rv]; ok && code.Class == pluginproto.ClassCaller {
		e.Class = pluginproto.ClassCaller
		e.Msg += ": " + code.Hint
	}
	return e
}

// ofOne reports whether err is about the object that a call was for, so that the calls for
// others may go well: it is no trouble with the session or the HSM.
func ofOne(err error) bool {
	ckr := ckrOf(err)
	code, known := codes[ckr]
	return isRefusal(err) || known && code.Class != pluginproto.ClassMember && !code.Gone ||
		ckr == pkcs11.CKR_KEY_UNEXTRACTABLE || ckr == pkcs11.CKR_OBJECT_HANDLE_INVALID
}

// ckrOf returns the return value in an error of the library's.
func ckrOf(err error) uint {
	if ckr, ok := errors.AsType[pkcs11.Error](err); ok {
		return uint(ckr)
	}
	return pkcs11.CKR_GENERAL_ERROR
}
