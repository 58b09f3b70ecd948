package p11_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

func someFrame() p11.Frame {
	return p11.Frame{Role: pluginproto.CloneTarget, Step: 1, Transfer: [16]byte{9}, Protocol: "cpv4", Payload: []byte("words")}
}

// A frame as this version writes it. Tokens of one group may run drivers of different
// versions, so it is never made anew.
const goldenFrame = "4b4d4346" + "01" + "02" + "01" + "09000000000000000000000000000000" + "0004" + "63707634" + "776f726473" +
	"62a74b5a6d6fa1397c584c53e9f3f989ddcf16205e129e0f83b0c3b5f5bcbd87"

func TestGoldenFrame(t *testing.T) {
	d := testDomain(t)
	raw, err := someFrame().Encode(d)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(raw); got != goldenFrame {
		t.Errorf("the frame is now\n%s, was\n%s", got, goldenFrame)
	}
	if got, err := p11.DecodeFrame(d, raw); err != nil || fmt.Sprint(got) != fmt.Sprint(someFrame()) {
		t.Errorf("%v became %v, %v", someFrame(), got, err)
	}
}

// What a source offers, as this version writes it.
const goldenOffer = "0002" +
	"01" + "01020300000000000000000000000000" + "02" + "636865636b76616c" + "0004" + "73686f70" + "0000" + "0003" + "756964" +
	"00" + "04000000000000000000000000000000"

func TestGoldenOffer(t *testing.T) {
	keys := []pluginproto.KeyID{{1, 2, 3}, {4}}
	all := []p11.Offer{{Object: secretObject(), UID: []byte("uid")}, {}}
	raw, err := p11.AppendOffer(keys, all)
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(raw); got != goldenOffer {
		t.Errorf("the offer is now\n%s, was\n%s", got, goldenOffer)
	}
	got, rest, err := p11.ParseOffer(append(raw, "words"...), keys)
	if err != nil || string(rest) != "words" || fmt.Sprint(got) != fmt.Sprint(all) {
		t.Errorf("%v became %v, before %q, %v", all, got, rest, err)
	}
}

func TestFramesThatAreRefused(t *testing.T) {
	d := testDomain(t)
	good, err := someFrame().Encode(d)
	if err != nil {
		t.Fatal(err)
	}
	body := good[:len(good)-32]
	sealed := func(change func([]byte) []byte) []byte {
		b := change(bytes.Clone(body))
		return append(b, d.Sum(b)...)
	}
	blob, err := p11.NewBlob([16]byte{9}, secretObject(), []byte("wrapped")).Encode(d)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, want string
		raw        []byte
	}{
		{"nothing", "it has 0 bytes", nil},
		{"one that is too long", "bytes", make([]byte, pluginproto.MaxBlob+1)},
		{"a blob of another kind", "does not begin", blob},
		{"a format of the future", "format version 2, this driver knows 1", sealed(func(b []byte) []byte { b[4] = 2; return b })},
		{"a name past the end", "lengths", sealed(func(b []byte) []byte { b[24] = 30; return b })},
		{"a name that is too long", "lengths", sealed(func(b []byte) []byte { return append(append(b[:23], 0, 33), make([]byte, 50)...) })},
		{"one that ends early", "lengths", sealed(func(b []byte) []byte { return b[:20] })},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := p11.DecodeFrame(d, tc.raw); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
	for at := range good {
		bad := bytes.Clone(good)
		bad[at] ^= 0x10
		if _, err := p11.DecodeFrame(d, bad); err == nil {
			t.Errorf("a flipped bit in byte %d is not noticed", at)
		}
	}
	for name, f := range map[string]p11.Frame{
		"a step that no protocol has": {Step: 256, Protocol: "cpv4"},
		"a long name":                 {Protocol: strings.Repeat("x", 33)},
		"too much to say":             {Protocol: "cpv4", Payload: make([]byte, pluginproto.MaxBlob)},
	} {
		if _, err := f.Encode(d); err == nil {
			t.Errorf("%s is written", name)
		}
	}
}

func TestOffersThatAreRefused(t *testing.T) {
	keys := []pluginproto.KeyID{{1, 2, 3}, {4}}
	good, err := p11.AppendOffer(keys, []p11.Offer{{Object: secretObject()}, {}})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, want string
		keys       []pluginproto.KeyID
		change     func([]byte) []byte
	}{
		{"nothing", "other keys than the 2", keys, func([]byte) []byte { return nil }},
		{"fewer keys than were asked for", "other keys than the 3", append(keys[:2:2], pluginproto.KeyID{5}), nil},
		{"other keys", "offers the key 01020300", []pluginproto.KeyID{{9}, {4}}, nil},
		{"other keys that it does not give", "offers the key 04000000", []pluginproto.KeyID{{1, 2, 3}, {5}}, nil},
		{"a key that is given and not given", "lengths", keys, func(b []byte) []byte { b[2] = 2; return b }},
		{"a key type of the future", "key type 99", keys, func(b []byte) []byte { b[19] = 99; return b }},
		{"one that ends early", "lengths", keys, func(b []byte) []byte { return b[:30] }},
		{"one that ends before the last key", "where", keys, func(b []byte) []byte { return b[:len(b)-1] }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			raw := bytes.Clone(good)
			if tc.change != nil {
				raw = tc.change(raw)
			}
			if _, _, err := p11.ParseOffer(raw, tc.keys); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
	if _, err := p11.AppendOffer(keys[:1], []p11.Offer{{Object: secretObject(), UID: make([]byte, p11.MaxUID+1)}}); err == nil {
		t.Error("a long UID is written")
	}
	for name, raw := range map[string][]byte{"too short": {1}, "neither yes nor no": {1, 2}} {
		if _, _, err := p11.ParseWants(raw, 2); err == nil {
			t.Errorf("wants that are %s are read", name)
		}
	}
	if got, rest, err := p11.ParseWants(p11.AppendWants(nil, 3, []int{0, 2}), 3); err != nil || fmt.Sprint(got) != "[0 2]" || len(rest) != 0 {
		t.Errorf("wants became %v before %q, %v", got, rest, err)
	}
}

// An extension may say as much as it is told, whatever the keys of the transfer are like.
func TestThereIsRoomForAPayload(t *testing.T) {
	var keys []pluginproto.KeyID
	var all []p11.Offer
	o := secretObject()
	o.Label = strings.Repeat("x", pluginproto.MaxLabel)
	o.Public = make([]byte, 1024)
	for range pluginproto.MaxCloneKeys {
		o.ID = newID()
		keys, all = append(keys, o.ID), append(all, p11.Offer{Object: o, UID: make([]byte, p11.MaxUID)})
	}
	f := someFrame()
	f.Protocol = strings.Repeat("x", 32)
	var err error
	if f.Payload, err = p11.AppendOffer(keys, all); err != nil {
		t.Fatal(err)
	}
	f.Payload = append(f.Payload, make([]byte, p11.MaxPayload)...)
	if _, err := f.Encode(testDomain(t)); err != nil {
		t.Error(err)
	}
}

func FuzzParseFrame(f *testing.F) {
	d, err := p11.NewDomain(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		f.Fatal(err)
	}
	good, err := someFrame().Encode(d)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good[:len(good)-32])
	f.Add([]byte("KMCF\x01"))
	f.Fuzz(func(t *testing.T, body []byte) {
		frame, err := p11.ParseFrame(body)
		if err != nil {
			return
		}
		again, err := frame.Encode(d)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		if !bytes.Equal(again[:len(again)-32], body) {
			t.Error("two frames say the same")
		}
	})
}

func FuzzParseOffer(f *testing.F) {
	keys := []pluginproto.KeyID{{1, 2, 3}, {4}}
	pair := secretObject()
	pair.Type, pair.ID = pluginproto.ECP256, keys[1]
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	if pair.Public, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		f.Fatal(err)
	}
	for _, all := range [][]p11.Offer{{{Object: secretObject(), UID: []byte("uid")}, {}}, {{}, {Object: pair}}} {
		raw, err := p11.AppendOffer(keys, all)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(append(raw, "words"...))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		all, rest, err := p11.ParseOffer(payload, keys)
		if err != nil {
			return
		}
		again, err := p11.AppendOffer(keys, all)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		if !bytes.Equal(append(again, rest...), payload) {
			t.Error("two offers say the same")
		}
	})
}
