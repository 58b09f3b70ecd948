package envelope_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"strings"
	"testing"

	"kmsd/kms/internal/envelope"
)

var update = flag.Bool("update", false, "is refused: golden envelopes stand for data that exists")

// goldens :: file → its SHA-256. They were made once, with another
// implementation of AES-GCM to check them, and have to be readable for ever.
var goldens = map[string]string{
	"testdata/aes-256-gcm.json": "7de876c787a761a7ba19d29df1972bbe7c69d2abb2ed8afa549b9b905229e57e",
	"testdata/aes-128-gcm.json": "d9560ab736dd11305d8186e5ff1be04d15a8a89d589aa4de4c5dc26eea55bcfc",
}

func TestGoldenEnvelopesAreReadForEver(t *testing.T) {
	if *update {
		t.Fatal("golden envelopes are never regenerated: a new format gets a new version and new files beside these")
	}
	for file, sum := range goldens {
		t.Run(file, func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got := sha256.Sum256(text); hex.EncodeToString(got[:]) != sum {
				t.Fatal("the file was changed; take it back")
			}
			var g map[string]string
			if err := json.Unmarshal(text, &g); err != nil {
				t.Fatal(err)
			}
			env, err := envelope.Parse(unhex(t, g["envelope"]))
			if err != nil {
				t.Fatal(err)
			}
			if env.Algorithm.String() != g["algorithm"] || !bytes.Equal(env.Identity[:], unhex(t, g["identity"])) || !bytes.Equal(env.IV[:], unhex(t, g["iv"])) {
				t.Errorf("header %+v", env.Header)
			}
			gcm := newGCM(t, unhex(t, g["key"]))
			plain, err := gcm.Open(nil, env.IV[:], env.Ciphertext, env.AAD(unhex(t, g["aad"])))
			if err != nil || !bytes.Equal(plain, unhex(t, g["plaintext"])) {
				t.Errorf("decrypted to %x, %v", plain, err)
			}
			if got := sealed(gcm, env.Header, unhex(t, g["plaintext"]), unhex(t, g["aad"])).Encode(); hex.EncodeToString(got) != g["envelope"] {
				t.Errorf("written as %x", got)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	good := sample()
	with := func(at int, b byte) []byte {
		c := bytes.Clone(good)
		c[at] = b
		return c
	}
	cases := []struct {
		name string
		in   []byte
		says string
	}{
		{"nothing", nil, `does not begin with "KMSD"`},
		{"the magic alone", good[:4], `does not begin with "KMSD"`},
		{"something else", []byte("vault:v1:abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz"), `does not begin with "KMSD"`},
		{"a newer format, by its version", with(4, 2), "format version 2, this kmsd knows version 1"},
		{"an unknown algorithm, by its number", with(5, 9), "unknown algorithm 9"},
		{"algorithm zero", with(5, 0), "unknown algorithm 0"},
		{"an envelope without plaintext", good[:envelope.Overhead], "cut short"},
		{"one that is longer than any", make([]byte, envelope.MaxSize+1), "KMSD"},
		{"a whole one with too much behind it", append(bytes.Clone(good), make([]byte, envelope.MaxSize)...), "at most"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if _, err := envelope.Parse(c.in); !errors.Is(err, envelope.ErrFormat) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want ErrFormat and %q", err, c.says)
			}
		})
	}
	for n := range envelope.Overhead + 1 {
		if _, err := envelope.Parse(good[:n]); !errors.Is(err, envelope.ErrFormat) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
}

func TestLargestPlaintextFits(t *testing.T) {
	e := envelope.Envelope{Header: envelope.Header{Algorithm: envelope.AES256GCM}, Ciphertext: make([]byte, envelope.MaxPlaintext+envelope.TagSize)}
	b := e.Encode()
	if len(b) != envelope.MaxSize {
		t.Errorf("%d bytes, want %d", len(b), envelope.MaxSize)
	}
	if _, err := envelope.Parse(b); err != nil {
		t.Error(err)
	}
}

func TestEveryAlteredBitIsNoticed(t *testing.T) {
	gcm := newGCM(t, make([]byte, 32))
	aad := []byte("database shop")
	good := sealed(gcm, envelope.Header{Algorithm: envelope.AES256GCM, Identity: [16]byte{1}, IV: [12]byte{2}}, []byte("plaintext"), aad).Encode()
	for bit := range len(good) * 8 {
		b := bytes.Clone(good)
		b[bit/8] ^= 1 << (bit % 8)
		e, err := envelope.Parse(b)
		if err != nil {
			continue
		}
		if _, err := gcm.Open(nil, e.IV[:], e.Ciphertext, e.AAD(aad)); err == nil {
			t.Errorf("bit %d of byte %d may be altered", bit%8, bit/8)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(sample(), uint16(37))
	f.Add([]byte("KMSD\x01"), uint16(0))
	f.Add([]byte{}, uint16(0))
	f.Fuzz(func(t *testing.T, b []byte, bit uint16) {
		e, err := envelope.Parse(b)
		if err != nil {
			if !errors.Is(err, envelope.ErrFormat) {
				t.Errorf("error %v is not ErrFormat", err)
			}
			return
		}
		if !bytes.Equal(e.Encode(), b) || !bytes.Equal(e.AppendTo([]byte("before"))[6:], b) {
			t.Errorf("%x is written as %x", b, e.Encode())
		}
		if aad := e.AAD([]byte("caller")); !bytes.Equal(aad, append(bytes.Clone(b[:envelope.HeaderSize]), "caller"...)) {
			t.Errorf("aad %x", aad)
		}
		altered := bytes.Clone(b)
		altered[int(bit)/8%len(b)] ^= 1 << (bit % 8)
		o, err := envelope.Parse(altered)
		if err == nil && bytes.Equal(o.AAD(nil), e.AAD(nil)) && bytes.Equal(o.Ciphertext, e.Ciphertext) {
			t.Errorf("bit %d makes no difference", bit)
		}
	})
}

func BenchmarkParseAndAAD(b *testing.B) {
	in, aad := sample(), []byte("database shop")
	b.ReportAllocs()
	for b.Loop() {
		e, err := envelope.Parse(in)
		if err != nil {
			b.Fatal(err)
		}
		_ = e.AAD(aad)
	}
}

func sample() []byte {
	return envelope.Envelope{
		Header:     envelope.Header{Algorithm: envelope.AES128GCM, Identity: [16]byte{1, 2, 3}, IV: [12]byte{4, 5, 6}},
		Ciphertext: bytes.Repeat([]byte{7}, 32+envelope.TagSize),
	}.Encode()
}

func sealed(gcm cipher.AEAD, h envelope.Header, plaintext, aad []byte) envelope.Envelope {
	return envelope.Envelope{Header: h, Ciphertext: gcm.Seal(nil, h.IV[:], plaintext, h.AAD(aad))}
}

func newGCM(t *testing.T, key []byte) cipher.AEAD {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	return gcm
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
