package lunasim_test

import (
	"bytes"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
	"kmsd/plugins/luna/lunasim/internal/ca"
)

// tunnel is one CPv4 session between two partitions, step by step.
type tunnel struct {
	source, target *token
	s, t           pkcs11.SessionHandle
	one, two       []byte
	ouid           []byte
	step           uint
}

const (
	cpv4Extract   = 0x80000208
	cpv4Insert    = 0x80000209
	continueOnErr = 1
)

func newTunnel(source, target *token) *tunnel {
	return &tunnel{source: source, target: target, s: source.session(), t: target.session()}
}

// dig makes a tunnel that stands.
func dig(t testing.TB, source, target *token) *tunnel {
	t.Helper()
	u := newTunnel(source, target)
	for _, step := range []func() uint{u.hello, u.answer, u.finish} {
		if rv := step(); rv != 0 {
			t.Fatalf("the negotiation answered %s", name(rv))
		}
	}
	return u
}

func (u *tunnel) hello() uint {
	var n uint
	if rv := u.target.ca.Call("CA_MigrationStartSessionNegotiation", uint(u.t), 0, []byte(nil), &u.step, &n, []byte(nil)); rv != 0 {
		return rv
	}
	u.one = make([]byte, n)
	return u.target.ca.Call("CA_MigrationStartSessionNegotiation", uint(u.t), 0, []byte(nil), &u.step, &n, u.one)
}

func (u *tunnel) answer() uint {
	var n, status, ouidLen uint
	call := func(out, ouid []byte) uint {
		step := u.step
		rv := u.source.ca.Call("CA_MigrationContinueSessionNegotiation", uint(u.s), step, len(u.one), u.one, 0, []byte(nil),
			&step, &n, out, &status, &ouidLen, ouid)
		if rv == 0 && out != nil {
			u.step = step
		}
		return rv
	}
	if rv := call(nil, nil); rv != 0 {
		return rv
	}
	u.two, u.ouid = make([]byte, n), make([]byte, ouidLen)
	return call(u.two, u.ouid)
}

func (u *tunnel) finish() uint {
	n, status, ouidLen := uint(bufferSize), uint(0), uint(12)
	return u.target.ca.Call("CA_MigrationContinueSessionNegotiation", uint(u.t), u.step, len(u.two), u.two, len(u.ouid), u.ouid,
		&u.step, &n, make([]byte, bufferSize), &status, &ouidLen, make([]byte, 12))
}

func (u *tunnel) close() (source, target uint) {
	return u.source.ca.Call("CA_MigrationCloseSession", uint(u.s), len(u.ouid), u.ouid),
		u.target.ca.Call("CA_MigrationCloseSession", uint(u.t), len(u.ouid), u.ouid)
}

// PCPROT_MAX_BUFFER_SIZE of the facts.
const bufferSize = 64000

// params lays out the structure of Extract or Insert in C memory.
func (u *tunnel) params(m *ca.Memory, mechanism, flags uint, n int, rest ...uint) uint {
	in, _ := m.Bytes(u.two, 0)
	ouid, _ := m.Bytes(u.ouid, 0)
	p, _ := m.Words(append([]uint{uint(len(u.two)), in, uint(len(u.ouid)), ouid, flags, uint(n)}, rest...)...)
	at, _ := m.Words(mechanism, p, uint(8*(6+len(rest))))
	return at
}

// extract asks for objects; typ is the element type of each.
func (u *tunnel) extract(flags, typ uint, keys ...pkcs11.ObjectHandle) (blobs [][]byte, results []uint, rv uint) {
	var m ca.Memory
	defer m.Free()
	n := len(keys)
	types, handles, lengths, pointers := make([]uint, n), make([]uint, n), make([]uint, n), make([]uint, n)
	buffers := make([][]byte, n)
	for i, key := range keys {
		types[i], handles[i], lengths[i] = typ, uint(key), bufferSize
		pointers[i], buffers[i] = m.Bytes(nil, bufferSize)
	}
	atTypes, _ := m.Words(types...)
	atHandles, _ := m.Words(handles...)
	atResults, seen := m.Words(make([]uint, n)...)
	atLengths, got := m.Words(lengths...)
	atBlobs, _ := m.Words(pointers...)
	rv = u.source.ca.Call("CA_Extract", uint(u.s), u.params(&m, cpv4Extract, flags, n, atTypes, atHandles, atResults, atLengths, atBlobs))
	for i := range keys {
		results = append(results, seen[i])
		blobs = append(blobs, bytes.Clone(buffers[i][:min(got[i], bufferSize)]))
	}
	return blobs, results, rv
}

func (u *tunnel) insert(flags, typ uint, blobs ...[]byte) (made, results []uint, rv uint) {
	var m ca.Memory
	defer m.Free()
	n := len(blobs)
	types, storage, lengths, pointers := make([]uint, n), make([]uint, n), make([]uint, n), make([]uint, n)
	for i, b := range blobs {
		types[i], storage[i], lengths[i] = typ, 1, uint(len(b))
		pointers[i], _ = m.Bytes(b, 0)
	}
	atTypes, _ := m.Words(types...)
	atStorage, _ := m.Words(storage...)
	atLengths, _ := m.Words(lengths...)
	atBlobs, _ := m.Words(pointers...)
	atResults, seen := m.Words(make([]uint, n)...)
	atHandles, handles := m.Words(make([]uint, n)...)
	rv = u.target.ca.Call("CA_Insert", uint(u.t), u.params(&m, cpv4Insert, flags, n, atTypes, atStorage, atLengths, atBlobs, atResults, atHandles))
	return bytesOfWords(handles), bytesOfWords(seen), rv
}

// bytesOfWords copies words out of memory that is about to be freed.
func bytesOfWords(w []uint) []uint { return append([]uint(nil), w...) }

func TestCPv4CarriesManyObjectsThroughOneTunnel(t *testing.T) {
	source, target := start(t, lunasim.Options{}), start(t, lunasim.Options{})
	a, b := source.aes("a"), source.aes("b")
	_, private := source.rsa("r")
	u := dig(t, source, target)
	for _, batch := range [][]pkcs11.ObjectHandle{{a, private}, {b}} {
		blobs, results, rv := u.extract(continueOnErr, 0, batch...)
		wantCode(t, "CA_Extract", rv, 0)
		made, inserted, rv := u.insert(continueOnErr, 0, blobs...)
		wantCode(t, "CA_Insert", rv, 0)
		for i, o := range batch {
			wantCode(t, "extracting", results[i], 0)
			wantCode(t, "inserting", inserted[i], 0)
			if got := target.ouid(pkcs11.ObjectHandle(made[i])); got != source.ouid(o) {
				t.Errorf("the OUID is %s on the target and %s on the source", got, source.ouid(o))
			}
		}
	}
	for _, id := range []string{"a", "b", "r"} {
		if want := source.bytesOf(id); len(want) == 0 || !bytes.Equal(target.bytesOf(id), want) {
			t.Errorf("key %q has other bytes on the target", id)
		}
	}
	s, d := u.close()
	wantCode(t, "closing at the source", s, 0)
	wantCode(t, "closing at the target", d, 0)
	_, _, rv := u.extract(continueOnErr, 0, a)
	wantCode(t, "a tunnel that was closed", rv, ckrTunnelInvalid)
}

func TestCPv4GivesEveryObjectItsOwnResult(t *testing.T) {
	source, target := start(t, lunasim.Options{}), start(t, lunasim.Options{})
	a, b := source.aes("a"), source.aes("b")
	nothing := pkcs11.ObjectHandle(11111)
	u := dig(t, source, target)
	for _, c := range []struct {
		name  string
		flags uint
		rv    uint
		third uint
	}{
		{"it goes on where it is told to", continueOnErr, 0, 0},
		{"else it stops at the first failure", 0, pkcs11.CKR_OBJECT_HANDLE_INVALID, ckrNotAttempted},
	} {
		blobs, results, rv := u.extract(c.flags, 0, a, nothing, b)
		wantCode(t, c.name, rv, c.rv)
		wantCode(t, c.name+": first", results[0], 0)
		wantCode(t, c.name+": second", results[1], pkcs11.CKR_OBJECT_HANDLE_INVALID)
		wantCode(t, c.name+": third", results[2], c.third)
		if len(blobs[1]) != 0 {
			t.Errorf("%s: there is a blob of nothing", c.name)
		}
	}
	_, results, _ := u.extract(continueOnErr, 1, a) // CK_PARAM_ELEMENT
	wantCode(t, "an element that is no object", results[0], ckrObjectType)

	blobs, _, _ := u.extract(continueOnErr, 0, a, b)
	blobs[0][len(blobs[0])/2] ^= 1
	_, results, rv := u.insert(0, 0, blobs...)
	wantCode(t, "inserting a blob that was altered", rv, pkcs11.CKR_DATA_INVALID)
	wantCode(t, "the one behind it", results[1], ckrNotAttempted)
	if n := len(target.find(attr(pkcs11.CKA_TOKEN, true))); n != 0 {
		t.Errorf("%d objects were left", n)
	}
}

func TestCPv4RefusesWhatIsNotOfTheTunnel(t *testing.T) {
	source, target := start(t, lunasim.Options{}), start(t, lunasim.Options{})
	a := source.aes("a")
	u, other := dig(t, source, target), dig(t, source, target)
	blobs, _, _ := u.extract(continueOnErr, 0, a)
	_, results, _ := other.insert(continueOnErr, 0, blobs...)
	wantCode(t, "a blob of another tunnel", results[0], pkcs11.CKR_DATA_INVALID)

	made, results, _ := u.insert(continueOnErr, 0, blobs...)
	wantCode(t, "its own", results[0], 0)
	if err := target.DestroyObject(target.h, pkcs11.ObjectHandle(made[0])); err != nil {
		t.Fatal(err)
	}
	_, results, _ = u.insert(continueOnErr, 0, blobs...)
	wantCode(t, "the same a second time", results[0], pkcs11.CKR_DATA_INVALID)

	back := &tunnel{source: target, target: source, s: u.t, t: u.s, two: u.two, ouid: u.ouid}
	_, _, rv := back.insert(continueOnErr, 0, blobs...)
	wantCode(t, "sent the wrong way", rv, ckrTunnelInvalid)

	input := *u
	input.two = u.one
	_, _, rv = input.extract(continueOnErr, 0, a)
	wantCode(t, "another input", rv, ckrNegotiation)

	other.s, other.t = u.s, u.t
	_, _, rv = other.extract(continueOnErr, 0, a)
	wantCode(t, "a tunnel of another session", rv, ckrTunnelInvalid)

	source.p.Set("tunnels_expired", "yes")
	_, _, rv = u.extract(continueOnErr, 0, a)
	wantCode(t, "a tunnel that has run out", rv, ckrTunnelExpired)
	if len(target.p.KeyBytes(t)) != 0 {
		t.Error("a key was left")
	}
}

func TestCPv4NegotiatesInOrder(t *testing.T) {
	source, target := start(t, lunasim.Options{}), start(t, lunasim.Options{})
	for _, c := range []struct {
		name string
		run  func(u *tunnel) uint
		want uint
	}{
		{"the second hello without a first", func(u *tunnel) uint {
			u.one, u.step = []byte("nothing"), 2
			return u.answer()
		}, ckrNegotiation},
		{"a first hello that was altered", func(u *tunnel) uint {
			u.hello()
			u.one[20] ^= 1
			return u.answer()
		}, ckrNegotiation},
		{"an end without a start", func(u *tunnel) uint {
			u.hello()
			u.answer()
			u.t = target.session()
			return u.finish()
		}, ckrNegotiation},
		{"the first hello in place of the second", func(u *tunnel) uint {
			u.hello()
			u.answer()
			u.two = u.one
			return u.finish()
		}, ckrNegotiation},
		{"a step that there is not", func(u *tunnel) uint {
			u.hello()
			u.step = 7
			return u.answer()
		}, ckrNegotiation},
		{"something else on the session in between", func(u *tunnel) uint {
			u.hello()
			u.answer()
			if _, err := target.GetSessionInfo(u.t); err != nil {
				t.Fatal(err)
			}
			return u.finish()
		}, ckrNegotiation},
		{"another tunnel's OUID", func(u *tunnel) uint {
			u.hello()
			u.answer()
			u.ouid = make([]byte, 12)
			return u.finish()
		}, ckrTunnelInvalid},
	} {
		wantCode(t, c.name, c.run(newTunnel(source, target)), c.want)
	}
	target.p.Set("third_call", "error")
	u := newTunnel(source, target)
	u.hello()
	u.answer()
	wantCode(t, "the third call, by the other reading", u.finish(), ckrNegotiation)
	blobs, _, rv := u.extract(continueOnErr, 0, source.aes("k"))
	wantCode(t, "extracting all the same", rv, 0)
	_, results, _ := u.insert(continueOnErr, 0, blobs...)
	wantCode(t, "inserting all the same", results[0], 0)
}

func TestCPv4NeedsWhatBothHave(t *testing.T) {
	for _, c := range []struct {
		name string
		set  func(source, target *lunasim.Partition)
		want uint
	}{
		{"both as they are", func(_, _ *lunasim.Partition) {}, 0},
		{"no domain in common", func(_, target *lunasim.Partition) { target.Set("domain", "blue") }, ckrNoPSK},
		{"the second of one is the third of the other", func(source, target *lunasim.Partition) {
			source.Set("domain", "red,green")
			target.Set("domain", "blue,yellow,green")
		}, 0},
		{"no domain at the target", func(_, target *lunasim.Partition) { target.Set("domain", "none") }, ckrMissingDomain},
		{"no domain at the source", func(source, _ *lunasim.Partition) { source.Set("domain", "none") }, ckrMissingDomain},
		{"no cipher suite in common", func(source, target *lunasim.Partition) {
			source.Set("suites", "1")
			target.Set("suites", "2")
		}, ckrNoAlgs},
		{"the target's clock is not set", func(_, target *lunasim.Partition) { target.Set("clock", "no") }, ckrClock},
		{"the source's clock is not set", func(source, _ *lunasim.Partition) { source.Set("clock", "no") }, ckrClock},
		{"policy 42 forces CPv1", func(source, _ *lunasim.Partition) { source.Set("policy.42", "1") }, ckrProtocolOff},
		{"firmware before 7.8.0", func(_, target *lunasim.Partition) { target.Set("firmware", "7.7.2") }, pkcs11.CKR_FUNCTION_NOT_SUPPORTED},
	} {
		t.Run(c.name, func(t *testing.T) {
			source, target := start(t, lunasim.Options{}), start(t, lunasim.Options{})
			c.set(source.p, target.p)
			u := newTunnel(source, target)
			rv := uint(0)
			for _, step := range []func() uint{u.hello, u.answer, u.finish} {
				if rv == 0 {
					rv = step()
				}
			}
			wantCode(t, "the negotiation", rv, c.want)
		})
	}
}
