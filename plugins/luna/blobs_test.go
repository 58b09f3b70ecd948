package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/internal/vendor"
)

// What does not fit beside the others is told as that object's error, and the others go on.
func TestBlobsThatDoNotFitTogether(t *testing.T) {
	large := bytes.Repeat([]byte{1}, p11.MaxPayload/3)
	said := packBlobs([]vendor.Blob{{Bytes: large}, {Bytes: []byte("small")}, {Bytes: large}, {Bytes: large}, {Bytes: []byte("last")}})
	if len(said) > p11.MaxPayload {
		t.Fatalf("%d bytes, at most %d are possible", len(said), p11.MaxPayload)
	}
	received, blobs, err := unpackBlobs(said, 5)
	if err != nil || len(blobs) != 4 {
		t.Fatalf("%d blobs, %v", len(blobs), err)
	}
	for i, r := range received {
		if (r.Err != nil) != (i == 3) {
			t.Errorf("blob %d: %v", i, r.Err)
		}
	}
	if pluginproto.ClassOf(received[3].Err) != pluginproto.ClassBusy || !strings.Contains(received[3].Err.Error(), "it goes alone") {
		t.Errorf("the one that does not fit: %v", received[3].Err)
	}
	if !bytes.Equal(blobs[1], []byte("small")) || !bytes.Equal(blobs[3], []byte("last")) {
		t.Error("blobs came in another order")
	}
}

// An error of the source's HSM is never taken for one of the target's.
func TestWhatTheSourceWithholdsSaysNothingOfTheTarget(t *testing.T) {
	for _, ckr := range []uint{pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_SESSION_HANDLE_INVALID, own + 0x20, own + 0x30, pkcs11.CKR_KEY_UNEXTRACTABLE} {
		_, _, err := unpackBlobs(packBlobs([]vendor.Blob{{Err: fmt.Errorf("CA_Extract: %w", pkcs11.Error(ckr))}}), 1)
		if err != nil {
			t.Fatal(err)
		}
		e, ok := errors.AsType[*pluginproto.Error](withholds(ckr))
		if !ok || e.Class == pluginproto.ClassMember || e.Permanent || e.CKR != ckr {
			t.Errorf("0x%X: %+v", ckr, e)
		}
	}
}

func TestWordsThatAreNotOfTheProtocol(t *testing.T) {
	good := packBlobs([]vendor.Blob{{Bytes: []byte("one")}, {Bytes: []byte("two")}})
	for name, word := range map[string][]byte{
		"nothing":              nil,
		"a length cut short":   good[:3],
		"a field cut short":    good[:len(good)-1],
		"a field more":         append(bytes.Clone(good), 0, 0, 0, 0),
		"one object of two":    packBlobs([]vendor.Blob{{Bytes: []byte("one")}}),
		"an answer of 4 bytes": pack([]byte{0, 0, 0, 0}, []byte("one"), number(0), []byte("two")),
		"success and no blob":  pack(number(0), nil, number(0), []byte("two")),
		"failure and a blob":   pack(number(7), []byte("one"), number(0), []byte("two")),
		"too many fields":      bytes.Repeat([]byte{0, 0, 0, 0}, maxFields+1),
	} {
		if _, _, err := unpackBlobs(word, 2); pluginproto.ClassOf(err) != pluginproto.ClassCaller {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, step := range map[string]func() error{
		"CPv1, part 2 before an offer": func() error { _, _, _, err := (&cpv1Target{}).Step(pack([]byte("part 2"))); return err },
		"CPv1, two parts 1":            func() error { _, _, err := (&cpv1Source{begun: true}).Step(pack(nil, nil), nil); return err },
		"CPv3, two objects": func() error {
			_, _, err := (&cpv3Source{begun: true}).Step(nil, make([]pkcs11.ObjectHandle, 2))
			return err
		},
		"CPv4, a hello without a step": func() error {
			_, _, err := (&cpv4Source{tunnel{steps: 1}}).Step(pack([]byte("hello")), nil)
			return err
		},
		"CPv4, no tunnel": func() error { _, _, _, err := (&cpv4Target{tunnel: tunnel{steps: 1}}).Step(pack(nil, nil)); return err },
	} {
		if err := step(); pluginproto.ClassOf(err) != pluginproto.ClassCaller {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzUnpackBlobs(f *testing.F) {
	f.Add(packBlobs([]vendor.Blob{{Bytes: []byte("one")}, {Err: pkcs11.Error(7)}}), 2)
	f.Add([]byte{255, 255, 255, 255}, 1)
	f.Fuzz(func(t *testing.T, in []byte, n int) {
		n &= 63
		received, blobs, err := unpackBlobs(in, n)
		if err != nil {
			return
		}
		came := 0
		for _, r := range received {
			if r.Err == nil {
				came++
			}
		}
		if len(received) != n || came != len(blobs) {
			t.Errorf("%d of %d objects and %d blobs", came, n, len(blobs))
		}
	})
}
