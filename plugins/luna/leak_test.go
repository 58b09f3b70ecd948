package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/luna/lunasim"
)

// opened is a driver process on a partition.
type opened struct {
	pluginproto.Driver
	p    *lunasim.Partition
	info pluginproto.TokenInfo
}

// openDriver starts a driver on a partition, with what is peculiar about its settings.
func openDriver(t testing.TB, p *lunasim.Partition, domain []byte, logged *journal) *opened {
	t.Helper()
	d := &opened{Driver: process(t, logged), p: p}
	var err error
	d.info, err = d.Open(t.Context(), pluginproto.OpenRequest{Settings: p.Settings(), PIN: []byte(p.PIN), Domain: domain})
	if err != nil {
		t.Fatalf("opening the driver: %v", err)
	}
	return d
}

func newDomain() []byte {
	domain := make([]byte, 32)
	_, _ = rand.Read(domain) // never fails
	return domain
}

// clone moves keys as the core does, and tells of every blob. It returns how many steps it took.
func clone(ctx context.Context, from, to *opened, protocol string, ids []pluginproto.KeyID, blob func([]byte) []byte) (steps int, err error) {
	source := pluginproto.CloneRequest{Role: pluginproto.CloneSource, Protocol: protocol, Keys: ids}
	_, _ = rand.Read(source.Transfer[:]) // never fails
	target := source
	target.Role = pluginproto.CloneTarget
	defer func() {
		for _, x := range []struct {
			d   *opened
			req pluginproto.CloneRequest
		}{{from, source}, {to, target}} {
			x.req.Step, x.req.Blob, x.req.End = 0, nil, true
			_, _ = x.d.CloneStep(ctx, x.req)
		}
	}()
	for ; ; source.Step, target.Step = source.Step+1, target.Step+1 {
		said, err := from.CloneStep(ctx, source)
		steps++
		if err != nil {
			return steps, fmt.Errorf("source step %d: %w", source.Step, err)
		}
		target.Blob = blob(said.Blob)
		said, err = to.CloneStep(ctx, target)
		steps++
		if err != nil {
			return steps, fmt.Errorf("target step %d: %w", target.Step, err)
		}
		source.Blob = blob(said.Blob)
		if said.Done {
			for _, k := range said.Keys {
				if k.Err != nil {
					return steps, k.Err
				}
			}
			return steps, nil
		}
	}
}

// No byte of a key crosses the relay, stands in a log or in an error, whatever is done to the
// blobs; and no key can be read from the partitions.
func TestNoKeyLeavesTheHSMsInTheClear(t *testing.T) {
	for _, way := range ways {
		t.Run(way.protocol, func(t *testing.T) {
			var seen bytes.Buffer
			var logs journal
			domain := newDomain()
			from := openDriver(t, lunasim.New(t, way.options), domain, &logs)
			to := openDriver(t, lunasim.New(t, way.options), domain, &logs)
			var ids []pluginproto.KeyID
			for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.HMACSHA256, pluginproto.RSA2048, pluginproto.ECP256} {
				id := pluginproto.KeyID{byte(len(ids) + 1)}
				if _, err := from.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: typ, Label: string(typ)}); err != nil {
					t.Fatal(err)
				}
				ids = append(ids, id)
			}
			for n, id := range ids {
				for victim := range 8 { // alters one blob after the other, and then none
					blobs := 0
					_, err := clone(t.Context(), from, to, way.protocol, ids[n:n+1], func(blob []byte) []byte {
						seen.Write(blob)
						if blobs++; blobs-1 == victim && len(blob) > 0 {
							blob = bytes.Clone(blob)
							blob[len(blob)/2] ^= 1
						}
						return blob
					})
					if err == nil {
						break
					}
					fmt.Fprintln(&seen, err)
				}
				if _, err := to.Inspect(t.Context(), id); err != nil {
					t.Fatalf("key %d did not arrive: %v", n, err)
				}
			}
			unreadable := neverExtractable(t, from.p) + neverExtractable(t, to.p)
			if want := 2 * len(ids); unreadable != want {
				t.Errorf("%d keys are out of reach, want %d", unreadable, want)
			}
			_ = from.Close()
			_ = to.Close()
			for id, key := range from.p.KeyBytes(t) {
				for _, form := range [][]byte{key, []byte(hex.EncodeToString(key)), []byte(base64.StdEncoding.EncodeToString(key)[:4*(len(key)/3)])} {
					if bytes.Contains(seen.Bytes(), form) || logs.has(form) {
						t.Errorf("the key %s was seen outside of the HSMs", id)
					}
				}
			}
		})
	}
}

// neverExtractable looks at all keys of a partition from a session of its own, and returns how
// many there are.
func neverExtractable(t *testing.T, p *lunasim.Partition) int {
	e := loadEnd(t, p)
	keys := e.find(t, "")
	for _, key := range keys {
		got, err := e.GetAttributeValue(e.h, key, []*pkcs11.Attribute{
			attr(pkcs11.CKA_EXTRACTABLE, nil), attr(pkcs11.CKA_NEVER_EXTRACTABLE, nil), attr(pkcs11.CKA_SENSITIVE, nil), attr(pkcs11.CKA_PRIVATE, nil),
		})
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range []byte{0, 1, 1, 1} {
			if !bytes.Equal(got[i].Value, []byte{want}) {
				t.Errorf("key %d: attribute 0x%X is %x", key, got[i].Type, got[i].Value)
			}
		}
		for _, secret := range []uint{pkcs11.CKA_VALUE, pkcs11.CKA_PRIVATE_EXPONENT} {
			if _, err := e.GetAttributeValue(e.h, key, []*pkcs11.Attribute{attr(secret, nil)}); err == nil {
				t.Errorf("key %d: attribute 0x%X can be read", key, secret)
			}
		}
		if _, err := e.WrapKey(e.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP_PAD, nil)}, key, key); err == nil {
			t.Errorf("key %d can be wrapped", key)
		}
	}
	return len(keys)
}
