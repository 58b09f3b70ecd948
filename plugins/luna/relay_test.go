package main

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/lunasim"
)

// ways are partitions that have each protocol as their best.
var ways = []struct {
	protocol string
	options  lunasim.Options
}{
	{cpv1, lunasim.Options{Firmware: "7.4.0"}},
	{cpv1New, lunasim.Options{Firmware: "7.8.0", Policies: map[int]int{policyCPv1: 1}}},
	{cpv3, lunasim.Options{Firmware: "7.7.1"}},
	{cpv4, lunasim.Options{Firmware: "7.8.0"}},
	{sim, lunasim.Options{Kind: "sim"}},
}

func TestEachProtocolCarriesKeys(t *testing.T) {
	for _, way := range ways {
		t.Run(way.protocol, func(t *testing.T) {
			from, to := openEnd(t, way.options), openEnd(t, way.options)
			if best := from.info.Cloning[0].Name; best != way.protocol {
				t.Errorf("the best protocol is %s", best)
			}
			secret, private := from.aes(t, "secret"), from.ec(t, "private")
			x := transfer{protocol: way.protocol}
			received, err := x.run(t, from, to, secret)
			arrives(t, to, received, err, "secret")
			received, err = x.run(t, from, to, private)
			arrives(t, to, received, err, "private")
			sameBytes(t, from, to, "secret", "private")
		})
	}
}

// sameBytes wants two partitions to hold the same true bytes under some IDs.
func sameBytes(t testing.TB, a, b *end, ids ...string) {
	t.Helper()
	at, bt := a.p.KeyBytes(t), b.p.KeyBytes(t)
	for _, id := range ids {
		key := hex.EncodeToString([]byte(id))
		if len(at[key]) == 0 || !bytes.Equal(at[key], bt[key]) {
			t.Errorf("the partitions hold different keys under %s", id)
		}
	}
}

// Where Thales' documents leave two readings, either is what the HSMs may turn out to do.
func TestEitherReadingOfTheDocumentsWorks(t *testing.T) {
	readings := []struct{ name, twc, kev, third, strict, exists string }{
		{"CPv1 wants the RSA certificate", "twc3", "target", "ok", "yes", "refused"},
		{"CPv1 wants the certificate on a curve", "ecc", "target", "ok", "yes", "refused"},
		{"CPv1 takes either certificate", "any", "target", "ok", "yes", "refused"},
		{"the source makes CPv1's KEV", "twc3", "source", "ok", "yes", "refused"},
		{"the source makes the KEV, and the certificate is on a curve", "ecc", "source", "ok", "yes", "refused"},
		{"the third call of CPv4 answers an error although the tunnel stands", "twc3", "target", "error", "yes", "refused"},
		{"a session bears other calls during a transfer", "twc3", "target", "ok", "no", "refused"},
		{"an object that is there already is doubled", "twc3", "target", "ok", "yes", "duplicate"},
		{"an object that is there already is overwritten", "twc3", "target", "ok", "yes", "overwrite"},
	}
	for _, way := range ways {
		t.Run(way.protocol, func(t *testing.T) {
			from, to := openEnd(t, way.options), openEnd(t, way.options)
			for n, reading := range readings {
				t.Run(reading.name, func(t *testing.T) {
					for _, e := range []*end{from, to} {
						e.p.Set("twc", reading.twc)
						e.p.Set("kev", reading.kev)
						e.p.Set("third_call", reading.third)
						e.p.Set("strict_session", reading.strict)
						e.p.Set("exists", reading.exists)
					}
					id := fmt.Sprintf("secret %d", n)
					received, err := (&transfer{protocol: way.protocol}).run(t, from, to, from.aes(t, id))
					arrives(t, to, received, err, id)
				})
			}
		})
	}
}

func TestAnObjectThatIsThereAlready(t *testing.T) {
	for _, way := range ways {
		t.Run(way.protocol, func(t *testing.T) {
			from, to := openEnd(t, way.options), openEnd(t, way.options)
			key := from.aes(t, "secret")
			x := transfer{protocol: way.protocol}
			first, err := x.run(t, from, to, key)
			arrives(t, to, first, err, "secret")
			for _, reading := range []struct {
				exists string
				copies int
			}{{"refused", 1}, {"overwrite", 1}, {"duplicate", 2}} {
				to.p.Set("exists", reading.exists)
				received, err := x.run(t, from, to, key)
				if reading.exists == "refused" {
					if err = firstError(received, err); ckrOf(err) != own+0x6F {
						t.Errorf("refused with %v", err)
					}
				} else if err != nil || received[0].Err != nil {
					t.Errorf("%s: %+v, %v", reading.exists, received, err)
				}
				if n := len(to.find(t, "secret")); n != reading.copies {
					t.Errorf("%s: %d copies", reading.exists, n)
				}
			}
			uid, err := from.UID(from.place(), key)
			if err != nil || len(uid) != 12 {
				t.Fatalf("the identity of the key: %x, %v", uid, err)
			}
			if _, found, err := to.ByUID(to.place(), uid); !found || err != nil {
				t.Errorf("looking for the copy by its identity: %v, %v", found, err)
			}
			if _, found, err := to.ByUID(to.place(), make([]byte, 12)); found || err != nil {
				t.Errorf("looking for what is not there: %v, %v", found, err)
			}
		})
	}
}

// firstError is what a transfer of one object came to.
func firstError(received []p11.Received, err error) error {
	if err == nil && len(received) > 0 {
		err = received[0].Err
	}
	return err
}

// Each word of each protocol is altered, left out, replaced by another one of the same
// transfer or of another one: the HSM takes no key, nothing stays behind on either side, and
// the next transfer goes well. The engine's frames would have refused all of this before.
func TestWhatIsNotOfTheTransferIsRefusedByTheHSM(t *testing.T) {
	for _, way := range ways {
		t.Run(way.protocol, func(t *testing.T) {
			from, to := openEnd(t, way.options), openEnd(t, way.options)
			earlier := transfer{protocol: way.protocol}
			received, err := earlier.run(t, from, to, from.aes(t, "earlier"))
			arrives(t, to, received, err, "earlier")
			key := from.aes(t, "secret")
			for at, honest := range earlier.heard {
				for _, m := range misuses(earlier.heard, at, honest) {
					if way.protocol == sim && m.replay {
						continue // a SIM blob goes in as often as it is wanted
					}
					refuses(t, from, to, key, way.protocol, at, m)
				}
			}
			received, err = (&transfer{protocol: way.protocol}).run(t, from, to, key)
			arrives(t, to, received, err, "secret")
			sameBytes(t, from, to, "secret", "earlier")
		})
	}
}

// misuse is what is done to a word.
type misuse struct {
	name   string
	replay bool
	alter  func(said []byte) []byte
}

// misuses are those of the word at a place; earlier are the words of another transfer.
func misuses(earlier [][]byte, at int, honest []byte) []misuse {
	var all []misuse
	add := func(name string, replay bool, alter func([]byte) []byte) {
		all = append(all, misuse{name, replay, alter})
	}
	if len(honest) > 0 {
		for _, place := range []int{0, 4, len(honest) / 3, len(honest) / 2, len(honest) - 1} {
			add(fmt.Sprintf("a bit flipped at %d of %d", place, len(honest)), false, func(said []byte) []byte {
				said[min(place, len(said)-1)] ^= 1
				return said
			})
		}
		add("cut short", false, func(said []byte) []byte { return said[:len(said)-1] })
		add("left out", false, func([]byte) []byte { return nil })
	}
	add("something behind it", false, func(said []byte) []byte { return append(said, 0, 0, 0, 1, 7) })
	add("endless", false, func([]byte) []byte { return bytes.Repeat([]byte{0, 0, 0, 1, 0}, 4096) })
	for i, word := range earlier {
		if len(word) > 0 {
			add(fmt.Sprintf("word %d of another transfer", i), i == at, func([]byte) []byte { return bytes.Clone(word) })
		}
	}
	return all
}

// refuses runs a transfer with one word misused.
func refuses(t *testing.T, from, to *end, key pkcs11.ObjectHandle, protocol string, at int, m misuse) {
	t.Helper()
	before, sessions := len(to.find(t, "")), [2]uint{from.sessions(t), to.sessions(t)}
	x := transfer{protocol: protocol, alter: func(n int, said []byte) []byte {
		if n == at {
			return m.alter(said)
		}
		return said
	}}
	received, err := x.run(t, from, to, key)
	if err := firstError(received, err); err == nil {
		// A change that does no harm may go unnoticed, if what has landed is a true copy.
		sameBytes(t, from, to, "secret")
		if err := to.DestroyObject(to.h, received[0].Object); err != nil {
			t.Fatal(err)
		}
		if !harmless(protocol, at, m) {
			t.Errorf("word %d, %s: taken", at, m.name)
		}
	}
	if now := len(to.find(t, "")); now != before {
		t.Fatalf("word %d, %s: %d keys on the partition, before %d (%v)", at, m.name, now, before, err)
	}
	if now := [2]uint{from.sessions(t), to.sessions(t)}; now != sessions {
		t.Fatalf("word %d, %s: sessions %v, before %v", at, m.name, now, sessions)
	}
}

// harmless are the changes that the HSMs need not notice. CPv4's first word is empty and nobody
// reads it, nor the target's last, which says only that it is there. CPv1's first word is the
// HSM's certificates, which are the same each time, and of several the target takes a good one.
func harmless(protocol string, at int, m misuse) bool {
	switch protocol {
	case cpv4:
		return at == 0 || at == 3
	case cpv1, cpv1New:
		return at == 0 && (m.replay || m.name == "something behind it")
	}
	return false
}

// sessions is how many sessions are open on the partition.
func (e *end) sessions(t testing.TB) uint {
	t.Helper()
	info, err := e.GetTokenInfo(e.slot)
	if err != nil {
		t.Fatal(err)
	}
	return info.SessionCount
}

// A tunnel is of no use to anybody when its transfer is over.
func TestTunnelsAreClosedAtBothEnds(t *testing.T) {
	from, to := openEnd(t, lunasim.Options{}), openEnd(t, lunasim.Options{})
	key := from.aes(t, "secret")
	source, target := &cpv4Source{tunnel{lib: from.lib, at: from.place()}}, &cpv4Target{tunnel: tunnel{lib: to.lib, at: to.place()}, objects: 1}
	var said []byte
	var err error
	for range 2 {
		if said, _, err = source.Step(said, nil); err != nil {
			t.Fatal(err)
		}
		if said, _, _, err = target.Step(said); err != nil {
			t.Fatal(err)
		}
	}
	blobs, err := from.lib.Extract(from.h, source.blob2, source.id, []pkcs11.ObjectHandle{key})
	if err != nil || blobs[0].Err != nil {
		t.Fatalf("before it is closed: %+v, %v", blobs, err)
	}
	id, blob2 := bytes.Clone(source.id), source.blob2
	source.Close()
	target.Close()
	if _, err := from.lib.Extract(from.h, blob2, id, []pkcs11.ObjectHandle{key}); ckrOf(err) != own+0x10D {
		t.Errorf("the source's end: %v", err)
	}
	if _, err := to.lib.Insert(to.h, blob2, id, [][]byte{blobs[0].Bytes}); ckrOf(err) != own+0x10D {
		t.Errorf("the target's end: %v", err)
	}
}

// What is wrong with one object does not keep the others of a transfer from arriving.
func TestObjectsOfATransferFailAlone(t *testing.T) {
	for _, protocol := range []string{cpv4, sim} {
		t.Run(protocol, func(t *testing.T) {
			o := lunasim.Options{}
			if protocol == sim {
				o.Kind = "sim"
			}
			from, to := openEnd(t, o), openEnd(t, o)
			keys := []pkcs11.ObjectHandle{from.aes(t, "one"), 987654, from.aes(t, "three")}
			received, err := (&transfer{protocol: protocol}).run(t, from, to, keys...)
			if err != nil {
				t.Fatal(err)
			}
			e, ok := errors.AsType[*pluginproto.Error](received[1].Err)
			if !ok || e.CKR != pkcs11.CKR_OBJECT_HANDLE_INVALID || e.Class != pluginproto.ClassUnknown || !strings.Contains(e.Msg, "does not give it away") {
				t.Errorf("the object that is not there: %v", received[1].Err)
			}
			arrives(t, to, []p11.Received{received[0], received[2]}, nil, "one", "three")
		})
	}
}
