package main

import (
	"github.com/miekg/pkcs11"

	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/internal/vendor"
)

// SIM carries each object as a blob under the HSMs' masking key (SMK), which both partitions
// have to share. There is one message, and its blobs can be kept. No authorisation is put on
// them: whoever holds the SMK reads them anyway, and the engine's frame goes around them.

type simSource struct {
	lib *vendor.Library
	at  p11.Place
}

func (s *simSource) Step(_ []byte, give []pkcs11.ObjectHandle) (out []byte, done bool, err error) {
	blobs := make([]vendor.Blob, len(give))
	for i, object := range give {
		blob, err := s.lib.SIMExtract(s.at.Session, object)
		if err != nil && !ofOne(err) {
			return nil, false, err
		}
		blobs[i] = vendor.Blob{Bytes: blob, Err: err}
	}
	return packBlobs(blobs), true, nil
}

func (s *simSource) Close() {}

type simTarget struct {
	lib     *vendor.Library
	at      p11.Place
	objects int
}

func (t *simTarget) Step(in []byte) (out []byte, received []p11.Received, done bool, err error) {
	received, blobs, err := unpackBlobs(in, t.objects)
	if err != nil {
		return nil, nil, false, err
	}
	for i := range received {
		if received[i].Err != nil {
			continue
		}
		received[i].Object, received[i].Err = t.lib.SIMInsert(t.at.Session, blobs[0])
		blobs = blobs[1:]
		if err := received[i].Err; err != nil && !ofOne(err) {
			return nil, received[:i], false, err
		}
	}
	return nil, received, true, nil
}

func (t *simTarget) Due() bool { return true }

func (t *simTarget) Close() {}
