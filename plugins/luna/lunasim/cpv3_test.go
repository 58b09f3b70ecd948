package lunasim_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
)

// cpv3 is one transfer by CPv3, step by step: a step that fails leaves its code.
type cpv3 struct {
	source, target *token
	s, t           pkcs11.SessionHandle
	key            pkcs11.ObjectHandle
	a, b, c        []byte
	made           uint
}

func newCPv3(source, target *token, key pkcs11.ObjectHandle) *cpv3 {
	return &cpv3{source: source, target: target, s: source.session(), t: target.session(), key: key}
}

func (x *cpv3) sourceInit() (rv uint) {
	// The flag comes last here, behind the buffer.
	var n uint
	if rv := x.source.ca.Call("CA_CloneAsSourceInit", uint(x.s), 0, 0, []byte(nil), &n, 0); rv != 0 {
		return rv
	}
	x.a = make([]byte, n)
	return x.source.ca.Call("CA_CloneAsSourceInit", uint(x.s), 0, 0, x.a, &n, 0)
}

func (x *cpv3) targetInit() (rv uint) {
	x.b, rv = x.target.blob("CA_CloneAsTargetInit", uint(x.t), x.a, len(x.a), 0, 0, 0)
	return rv
}

func (x *cpv3) asSource() (rv uint) {
	x.c, rv = x.source.blob("CA_CloneAsSource", uint(x.s), 0, uint(x.key), x.b, len(x.b), 0)
	return rv
}

func (x *cpv3) asTarget() uint {
	return x.target.ca.Call("CA_CloneAsTarget", uint(x.t), 0, 0, x.c, len(x.c), 0, 0, 0, &x.made)
}

// run goes on until a step fails.
func (x *cpv3) run() uint {
	for _, step := range []func() uint{x.sourceInit, x.targetInit, x.asSource, x.asTarget} {
		if rv := step(); rv != 0 {
			return rv
		}
	}
	return 0
}

func TestCPv3ClonesAKeyWithItsOUID(t *testing.T) {
	source, target := start(t, lunasim.Options{Firmware: "7.7.0"}), start(t, lunasim.Options{Firmware: "7.7.0"})
	key := source.aes("k")
	x := newCPv3(source, target, key)
	wantCode(t, "the transfer", x.run(), 0)
	made := pkcs11.ObjectHandle(x.made)
	if got, want := target.ouid(made), source.ouid(key); got != want {
		t.Errorf("the OUID is %s on the target and %s on the source", got, want)
	}
	if got := string(target.get(made, pkcs11.CKA_LABEL)); got != "label of k" {
		t.Errorf("the label is %q", got)
	}
	want := source.bytesOf("k")
	if got := target.bytesOf("k"); len(want) != 32 || !bytes.Equal(got, want) {
		t.Errorf("the target has %x, the source %x", got, want)
	}
	for _, blob := range [][]byte{x.a, x.b, x.c} {
		if bytes.Contains(blob, want) || bytes.Contains(blob, want[:8]) {
			t.Error("the key can be read in a blob")
		}
	}
}

func TestCPv3RefusesWhatIsNotOfTheTransfer(t *testing.T) {
	source, target := start(t, lunasim.Options{}), start(t, lunasim.Options{})
	key := source.aes("k")
	other := newCPv3(source, target, key)
	wantCode(t, "another transfer", other.run(), 0)
	if err := target.DestroyObject(target.h, pkcs11.ObjectHandle(other.made)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		steps int              // that go well
		spoil func(x *cpv3)    // before the next
		next  func(*cpv3) uint // nil is the next
		want  uint
	}{
		{"the first blob altered", 1, func(x *cpv3) { x.a[12] ^= 1 }, nil, pkcs11.CKR_DATA_INVALID},
		{"the second blob altered", 2, func(x *cpv3) { x.b[12] ^= 1 }, nil, pkcs11.CKR_DATA_INVALID},
		{"the third blob altered", 3, func(x *cpv3) { x.c[len(x.c)/2] ^= 1 }, nil, pkcs11.CKR_DATA_INVALID},
		{"the third blob cut", 3, func(x *cpv3) { x.c = x.c[:len(x.c)-1] }, nil, pkcs11.CKR_DATA_INVALID},
		{"the second blob of another transfer", 2, func(x *cpv3) { x.b = other.b }, nil, pkcs11.CKR_DATA_INVALID},
		{"the third blob of another transfer", 3, func(x *cpv3) { x.c = other.c }, nil, pkcs11.CKR_DATA_INVALID},
		{"the first blob sent back", 1, func(x *cpv3) { x.b = x.a }, (*cpv3).asSource, pkcs11.CKR_DATA_INVALID},
		{"the second blob sent back", 2, func(x *cpv3) { x.c = x.b }, (*cpv3).asTarget, pkcs11.CKR_DATA_INVALID},
		{"the last step without a start", 3, func(x *cpv3) { x.t = target.session() }, nil, pkcs11.CKR_OPERATION_NOT_INITIALIZED},
		{"the source's answer without a start", 2, func(x *cpv3) { x.s = source.session() }, nil, pkcs11.CKR_DATA_INVALID},
		{"something else on the source's session", 2, func(x *cpv3) { x.source.use(x.s) }, nil, pkcs11.CKR_DATA_INVALID},
		{"something else on the target's session", 3, func(x *cpv3) { x.target.use(x.t) }, nil, pkcs11.CKR_OPERATION_NOT_INITIALIZED},
		{"a key that there is not", 2, func(x *cpv3) { x.key = 11111 }, nil, pkcs11.CKR_OBJECT_HANDLE_INVALID},
		{"the last step once more", 4, func(*cpv3) {}, (*cpv3).asTarget, pkcs11.CKR_OPERATION_NOT_INITIALIZED},
	} {
		t.Run(c.name, func(t *testing.T) {
			steps := []func(*cpv3) uint{(*cpv3).sourceInit, (*cpv3).targetInit, (*cpv3).asSource, (*cpv3).asTarget}
			x := newCPv3(source, target, key)
			for i, step := range steps[:c.steps] {
				wantCode(t, fmt.Sprintf("step %d", i+1), step(x), 0)
			}
			c.spoil(x)
			next := c.next
			if next == nil {
				next = steps[c.steps]
			}
			wantCode(t, "what follows", next(x), c.want)
			left := target.find(attr(pkcs11.CKA_TOKEN, true))
			if want := c.steps / 4; len(left) != want {
				t.Errorf("there are %d objects on the target, want %d", len(left), want)
			}
			for _, o := range left {
				if err := target.DestroyObject(target.h, o); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// use does something on a session that has nothing to do with a transfer.
func (k *token) use(h pkcs11.SessionHandle) {
	k.t.Helper()
	if _, err := k.GenerateRandom(h, 8); err != nil {
		k.t.Fatal(err)
	}
}

func TestATransferMayShareItsSessionWhereTheSwitchSaysSo(t *testing.T) {
	lax := map[string]string{"strict_session": "no"}
	source, target := start(t, lunasim.Options{Switches: lax}), start(t, lunasim.Options{Switches: lax})
	x := newCPv3(source, target, source.aes("k"))
	for i, step := range []func() uint{x.sourceInit, x.targetInit, x.asSource, x.asTarget} {
		wantCode(t, fmt.Sprintf("step %d", i+1), step(), 0)
		source.use(x.s)
		target.use(x.t)
	}
}

// TestWhoMayClone is about what both ends are; the protocol is CPv3 unless the case is
// about another.
func TestWhoMayClone(t *testing.T) {
	old := lunasim.Options{Firmware: "7.4.0"}
	forced := lunasim.Options{Policies: map[int]int{42: 1}}
	for _, c := range []struct {
		name           string
		source, target lunasim.Options
		cpv1           bool
		want           uint
	}{
		{"two of one domain", lunasim.Options{}, lunasim.Options{}, false, 0},
		{"7.7.0 to 7.8.0", lunasim.Options{Firmware: "7.7.0"}, lunasim.Options{}, false, 0},
		{"7.8.0 to 7.7.0", lunasim.Options{}, lunasim.Options{Firmware: "7.7.0"}, false, 0},
		{"another domain", lunasim.Options{}, lunasim.Options{Domain: "blue"}, false, pkcs11.CKR_DATA_INVALID},
		{"another domain, by another code", lunasim.Options{}, lunasim.Options{Domain: "blue", Switches: map[string]string{"domain_code": "0x80000009"}}, false, ckrMissingDomain},
		{"no domain", lunasim.Options{Domain: "none"}, lunasim.Options{}, false, ckrMissingDomain},
		{"firmware before 7.7.0 knows no CPv3", old, old, false, pkcs11.CKR_FUNCTION_NOT_SUPPORTED},
		{"policy 42 switches CPv3 off", lunasim.Options{}, forced, false, ckrProtocolOff},
		{"private keys only at the source", lunasim.Options{Policies: map[int]int{4: 0}}, lunasim.Options{}, false, ckrNotAllowed},
		{"private keys only at the target", lunasim.Options{}, lunasim.Options{Policies: map[int]int{4: 0}}, false, ckrNotAllowed},
		{"a key-export partition", lunasim.Options{Kind: "export"}, lunasim.Options{}, false, ckrNotAllowed},
		{"the HSM clones nothing", lunasim.Options{HSMPolicies: map[int]int{7: 0}}, lunasim.Options{}, false, ckrNotAllowed},
		{"nor over a network", lunasim.Options{}, lunasim.Options{HSMPolicies: map[int]int{16: 0}}, false, ckrNotAllowed},
		{"CPv1 among old ones", old, old, true, 0},
		{"CPv1 among the oldest", lunasim.Options{Firmware: "5.7.0"}, old, true, 0},
		{"CPv1 where policy 42 forces it", forced, forced, true, 0},
		{"CPv1 where policy 42 is off", lunasim.Options{}, lunasim.Options{}, true, ckrProtocolOff},
		{"old gives to new by CPv1", old, forced, true, 0},
		{"new gives nothing to old", forced, old, true, ckrNotAllowed},
		{"CPv1 with the other certificate", withSwitch(old, "twc", "ecc"), withSwitch(old, "twc", "ecc"), true, 0},
		{"CPv1 with the source's KEV", withSwitch(old, "kev", "source"), withSwitch(old, "kev", "source"), true, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			source, target := start(t, c.source), start(t, c.target)
			run := newCPv3(source, target, source.aes("k")).run
			if c.cpv1 {
				run = newCPv1(source, target, source.find(attr(pkcs11.CKA_ID, []byte("k")))[0]).run
			}
			wantCode(t, "the transfer", run(), c.want)
			if got := len(target.p.KeyBytes(t)); got != 1 && c.want == 0 || got != 0 && c.want != 0 {
				t.Errorf("the target has %d keys", got)
			}
		})
	}
}

func withSwitch(o lunasim.Options, name, value string) lunasim.Options {
	o.Switches = map[string]string{name: value}
	return o
}

func TestCloningAnOUIDThatIsThere(t *testing.T) {
	for reading, want := range map[string]struct {
		rv   uint
		keys int
		same bool // the object from before is there still
	}{
		"refused":   {ckrExists, 1, true},
		"duplicate": {0, 2, true},
		"overwrite": {0, 1, false},
	} {
		source, target := start(t, lunasim.Options{}), start(t, lunasim.Options{})
		target.p.Set("exists", reading)
		key := source.aes("k")
		first := newCPv3(source, target, key)
		wantCode(t, reading+", the first time", first.run(), 0)
		wantCode(t, reading, newCPv3(source, target, key).run(), want.rv)
		if found := target.find(attr(pkcs11.CKA_TOKEN, true)); len(found) != want.keys {
			t.Errorf("%s: there are %d keys, want %d", reading, len(found), want.keys)
		} else if slices.Contains(found, pkcs11.ObjectHandle(first.made)) != want.same {
			t.Errorf("%s: the key is %v, from before %v", reading, found, first.made)
		}
	}
}

func TestPolicyZeroIsAboutPrivateKeys(t *testing.T) {
	for _, c := range []struct {
		policy          int
		private, secret uint
	}{{0, ckrNotAllowed, 0}, {4, 0, ckrNotAllowed}} {
		source, target := start(t, lunasim.Options{Policies: map[int]int{c.policy: 0}}), start(t, lunasim.Options{})
		public, private := source.rsa("r")
		wantCode(t, "a private key", newCPv3(source, target, private).run(), c.private)
		wantCode(t, "a secret key", newCPv3(source, target, source.aes("k")).run(), c.secret)
		wantCode(t, "a public key", newCPv3(source, target, public).run(), 0)
	}
}

func TestABufferThatIsTooSmallBreaksNothing(t *testing.T) {
	source, target := start(t, lunasim.Options{}), start(t, lunasim.Options{})
	x := newCPv3(source, target, source.aes("k"))
	x.sourceInit()
	wantCode(t, "the target's start", x.targetInit(), 0)
	n := uint(10)
	call := func(out []byte) uint {
		return source.ca.Call("CA_CloneAsSource", uint(x.s), 0, uint(x.key), x.b, len(x.b), 0, out, &n)
	}
	wantCode(t, "ten bytes of room", call(make([]byte, 10)), pkcs11.CKR_BUFFER_TOO_SMALL)
	if n <= 10 {
		t.Fatalf("%d bytes are asked for", n)
	}
	x.c = make([]byte, n)
	wantCode(t, "enough room", call(x.c), 0)
	wantCode(t, "the target's end", x.asTarget(), 0)
}

func TestCloningWithinOneLibraryIsOfNoUse(t *testing.T) {
	source, target := start(t, lunasim.Options{}), start(t, lunasim.Options{})
	key, far := source.aes("k"), source.h
	for range 4 { // a handle that the other library does not have
		far = source.session()
	}
	var made uint
	wantCode(t, "across libraries", target.ca.Call("CA_CloneObject", uint(target.h), uint(far), 0, uint(key), &made), pkcs11.CKR_SESSION_HANDLE_INVALID)
	wantCode(t, "onto itself", source.ca.Call("CA_CloneObject", uint(source.h), uint(far), 0, uint(key), &made), ckrExists)
}
