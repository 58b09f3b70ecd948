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

	"testdata/v2-aes-256-gcm-iv-12.json": "248a25bbe6004251ecd12f95f32261f05adaadea1a3ee1666e64913e59f35dc2",
	"testdata/v2-aes-256-gcm-iv-16.json": "9ef9ffd861853f2c7b1b771b6987d9f3e1414d421ebb0943bc84685c223bef1b",
	"testdata/v2-aes-128-gcm-iv-12.json": "27c0d5def300242810eea9e67c431f5c6000d12db0558c9a169b2b5c66db0b2a",
	"testdata/v2-aes-128-gcm-iv-16.json": "d9a552749e8207c3a74ea62e33399d3d6b1256a08ce9e37e6231d34be72b8a57",
}

// golden is what a golden file says, in hex but for the algorithm.
type golden map[string]string

func TestGoldenEnvelopesAreReadForEver(t *testing.T) {
	if *update {
		t.Fatal("golden envelopes are never regenerated: a new format gets a new version and new files beside these")
	}
	for file := range goldens {
		t.Run(file, func(t *testing.T) {
			g := readGolden(t, file)
			env, err := envelope.Parse(unhex(t, g["envelope"]))
			if err != nil {
				t.Fatal(err)
			}
			plaintext, aad := unhex(t, g["plaintext"]), unhex(t, g["aad"])
			if env.Algorithm.String() != g["algorithm"] || !bytes.Equal(env.Identity[:], unhex(t, g["identity"])) ||
				!bytes.Equal(env.IV, unhex(t, g["iv"])) || env.PlaintextSize() != len(plaintext) {
				t.Errorf("read as %+v", env)
			}
			gcm := newGCM(t, unhex(t, g["key"]), len(env.IV))
			plain, err := gcm.Open(nil, env.IV, env.Ciphertext, env.AAD(aad))
			if err != nil || !bytes.Equal(plain, plaintext) {
				t.Errorf("decrypted to %x, %v", plain, err)
			}
			if got := env.Encode(); hex.EncodeToString(got) != g["envelope"] {
				t.Errorf("written as %x", got)
			}
			if strings.HasPrefix(file, "testdata/v2-") {
				made := sealed(gcm, envelope.Envelope{Algorithm: env.Algorithm, Identity: env.Identity}, env.IV, plaintext, aad)
				if got := made.Encode(); hex.EncodeToString(got) != g["envelope"] {
					t.Errorf("made anew it is %x", got)
				}
			}
		})
	}
}

func readGolden(t *testing.T, file string) golden {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got := sha256.Sum256(text); hex.EncodeToString(got[:]) != goldens[file] {
		t.Fatal("the file was changed; take it back")
	}
	var g golden
	if err := json.Unmarshal(text, &g); err != nil {
		t.Fatal(err)
	}
	return g
}

func TestParseRefuses(t *testing.T) {
	good, long := sample(envelope.IVSize), sample(envelope.LongIVSize)
	first := unhex(t, readGolden(t, "testdata/aes-128-gcm.json")["envelope"])
	with := func(b []byte, at int, value byte) []byte {
		b = bytes.Clone(b)
		b[at] = value
		return b
	}
	cases := []struct {
		name string
		in   []byte
		says string
	}{
		{"nothing", nil, `does not begin with "KMSD"`},
		{"the magic alone", good[:4], `does not begin with "KMSD"`},
		{"something else", []byte("vault:v1:abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz"), `does not begin with "KMSD"`},
		{"a newer format, by its version", with(good, 4, 3), "format version 3, this kmsd knows versions 1 and 2"},
		{"format zero", with(good, 4, 0), "format version 0"},
		{"an unknown algorithm, by its number", with(good, 5, 9), "unknown algorithm 9"},
		{"algorithm zero", with(first, 5, 0), "unknown algorithm 0"},
		{"no IV", with(good, 22, 0), "an IV of 0 bytes, 12 or 16 expected"},
		{"an IV of a length between the two", with(long, 22, 13), "an IV of 13 bytes"},
		{"an IV that goes beyond the end", with(good, 22, 255), "an IV of 255 bytes"},
		{"an envelope without plaintext", good[:51], "51 bytes, at least 52 expected; it is cut short"},
		{"one with a long IV, without plaintext", long[:55], "55 bytes, at least 56 expected; it is cut short"},
		{"one of the first format, without plaintext", first[:50], "50 bytes, at least 51 expected; it is cut short"},
		{"one that is longer than any", make([]byte, envelope.MaxSize+1), "KMSD"},
		{"a whole one with too much behind it", append(bytes.Clone(long), make([]byte, envelope.MaxSize)...), "at most 65591"},
		{"one that would be good with a long IV", append(bytes.Clone(good), make([]byte, envelope.MaxSize-len(good))...), "65591 bytes, at most 65587"},
		{"one that would be good in the second format", append(bytes.Clone(first), make([]byte, envelope.MaxSize-4-len(first))...), "65587 bytes, at most 65586"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if _, err := envelope.Parse(c.in); !errors.Is(err, envelope.ErrFormat) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want ErrFormat and %q", err, c.says)
			}
		})
	}
	for _, whole := range [][]byte{first, good, long} {
		shortest := len(whole)
		if whole[4] == 2 {
			shortest -= 31 // down to a plaintext of one byte
		}
		for n := range shortest {
			if _, err := envelope.Parse(whole[:n]); !errors.Is(err, envelope.ErrFormat) {
				t.Errorf("version %d cut to %d bytes: %v", whole[4], n, err)
			}
		}
		if _, err := envelope.Parse(whole[:shortest]); err != nil {
			t.Errorf("version %d of %d bytes: %v", whole[4], shortest, err)
		}
	}
}

func TestSizes(t *testing.T) {
	for _, n := range []int{envelope.IVSize, envelope.LongIVSize} {
		e := envelope.Envelope{Algorithm: envelope.AES256GCM, IV: make([]byte, n), Ciphertext: make([]byte, envelope.MaxPlaintext+envelope.TagSize)}
		b := e.Encode()
		if want := envelope.MaxSize - envelope.LongIVSize + n; len(b) != want {
			t.Errorf("the largest plaintext with an IV of %d makes %d bytes, want %d", n, len(b), want)
		}
		if got, err := envelope.Parse(b); err != nil || got.PlaintextSize() != envelope.MaxPlaintext {
			t.Errorf("read as one of %d bytes, %v", got.PlaintextSize(), err)
		}
	}
	if aad := (envelope.Envelope{}).AAD(nil); len(aad) > envelope.MaxHeader {
		t.Errorf("the header has %d bytes, at most %d were announced", len(aad), envelope.MaxHeader)
	}
	first, err := envelope.Parse(unhex(t, readGolden(t, "testdata/aes-128-gcm.json")["envelope"]))
	if err != nil || len(first.AAD(nil)) != envelope.MaxHeader {
		t.Errorf("the header of the first format has %d bytes, want %d (%v)", len(first.AAD(nil)), envelope.MaxHeader, err)
	}
}

func TestEveryAlteredBitIsNoticed(t *testing.T) {
	for file := range goldens {
		t.Run(file, func(t *testing.T) {
			g := readGolden(t, file)
			good, key, aad := unhex(t, g["envelope"]), unhex(t, g["key"]), unhex(t, g["aad"])
			for bit := range len(good) * 8 {
				b := bytes.Clone(good)
				b[bit/8] ^= 1 << (bit % 8)
				if opens(t, key, b, aad) {
					t.Errorf("bit %d of byte %d may be altered", bit%8, bit/8)
				}
			}
			if !opens(t, key, good, aad) {
				t.Error("nor does it open unaltered")
			}
		})
	}
}

// What separates the parts of an envelope is not authenticated, so an envelope may be
// cut up in another way: it must not open.
func TestAnotherFormatOrLengthDoesNotOpen(t *testing.T) {
	for file := range goldens {
		g := readGolden(t, file)
		good, key, aad := unhex(t, g["envelope"]), unhex(t, g["key"]), unhex(t, g["aad"])
		for _, form := range []byte{1, 2} {
			for _, size := range []byte{0, envelope.IVSize, envelope.LongIVSize} {
				b := bytes.Clone(good)
				b[4], b[22] = form, size
				if bytes.Equal(b, good) {
					continue
				}
				if opens(t, key, b, aad) {
					t.Errorf("%s opens as format %d with %d in the place of the length", file, form, size)
				}
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(sample(envelope.IVSize), uint16(37))
	f.Add(sample(envelope.LongIVSize), uint16(22*8+2))
	f.Add(append([]byte("KMSD\x01\x01"), make([]byte, 60)...), uint16(4*8+1))
	f.Add([]byte("KMSD\x01"), uint16(0))
	f.Add([]byte("KMSD\x02"), uint16(0))
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
		if n := e.PlaintextSize(); n < 1 || n > envelope.MaxPlaintext || len(b)-n > envelope.MaxOverhead {
			t.Errorf("%d bytes are an envelope of %d", len(b), n)
		}
		header := len(b) - len(e.Ciphertext) // of the first format; the second leaves out the IV and its length
		if b[4] == 2 {
			header -= 1 + len(e.IV)
		}
		if aad := e.AAD([]byte("caller")); !bytes.Equal(aad, append(bytes.Clone(b[:header]), "caller"...)) {
			t.Errorf("aad %x", aad)
		}
		altered := bytes.Clone(b)
		altered[int(bit)/8%len(b)] ^= 1 << (bit % 8)
		o, err := envelope.Parse(altered)
		if err == nil && bytes.Equal(o.AAD(nil), e.AAD(nil)) && bytes.Equal(o.IV, e.IV) && bytes.Equal(o.Ciphertext, e.Ciphertext) {
			t.Errorf("bit %d makes no difference", bit)
		}
	})
}

func BenchmarkParseAndAAD(b *testing.B) {
	in, aad := sample(envelope.IVSize), []byte("database shop")
	b.ReportAllocs()
	for b.Loop() {
		e, err := envelope.Parse(in)
		if err != nil {
			b.Fatal(err)
		}
		_ = e.AAD(aad)
	}
}

// sample is an envelope of 32 bytes with an IV of n.
func sample(n int) []byte {
	return envelope.Envelope{
		Algorithm: envelope.AES128GCM, Identity: [16]byte{1, 2, 3}, IV: bytes.Repeat([]byte{4}, n),
		Ciphertext: bytes.Repeat([]byte{7}, 32+envelope.TagSize),
	}.Encode()
}

// sealed is what kmsd does with a token: the header is authenticated before there is an IV.
func sealed(gcm cipher.AEAD, e envelope.Envelope, iv, plaintext, aad []byte) envelope.Envelope {
	e.Ciphertext = gcm.Seal(nil, iv, plaintext, e.AAD(aad))
	e.IV = iv
	return e
}

// opens reports whether bytes are an envelope that authenticates.
func opens(t *testing.T, key, b, aad []byte) bool {
	t.Helper()
	e, err := envelope.Parse(b)
	if err != nil {
		return false
	}
	_, err = newGCM(t, key, len(e.IV)).Open(nil, e.IV, e.Ciphertext, e.AAD(aad))
	return err == nil
}

func newGCM(t *testing.T, key []byte, ivSize int) cipher.AEAD {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCMWithNonceSize(block, ivSize)
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
