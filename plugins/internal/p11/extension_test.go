package p11_test

import (
	"crypto/aes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// world is the HSMs of a test that clone by a way of their own: what they share, how they
// misbehave, and what they have not let go of.
type world struct {
	mu       sync.Mutex // guards the rest
	open     int        // ends of transfers that were not closed
	lent     []end      // every end that there was, with the session that it was lent
	prepared int
	uids     map[string][]byte // :: CKA_ID → UID, of keys that do not have the usual one
	blind    bool              // they cannot look for an object by its UID
	lost     bool              // what they fail to do at last is done all the same
	cloning  []pluginproto.CloneProtocol

	extend, prepare, describe error
	preparing                 func()
	fail                      map[string]error // :: "source 1" → how that step fails
	before                    func(step string)
	bend                      func(*parcel)                       // what comes to a target, before it becomes an object
	answer                    func([]p11.Received) []p11.Received // what a target says has come
}

// errTaken is what an HSM answers that has the object already.
const errTaken pkcs11.Error = 0x8000006F

func newWorld() *world {
	return &world{
		uids: map[string][]byte{}, fail: map[string]error{}, before: func(string) {}, preparing: func() {},
		bend: func(*parcel) {}, answer: func(r []p11.Received) []p11.Received { return r },
		cloning: []pluginproto.CloneProtocol{
			{Name: "relay", Gives: true, Takes: true, Keys: 1},
			{Name: "batch", Gives: true, Takes: true, Keys: 50},
			{Name: "alone", Gives: true, Takes: true, Alone: true, Keys: 50},
		},
	}
}

// quirks are those of the HSMs.
func (w *world) quirks() p11.Quirks {
	q := quirks()
	q.OnToken, q.FindsByID = true, true
	q.SessionCopies = false
	q.Extend = func(module string) (p11.Extension, error) {
		if w.extend != nil {
			return nil, w.extend
		}
		lib := pkcs11.New(module) // loaded already
		if lib == nil {
			return nil, errors.New("the library cannot be loaded")
		}
		return &fake{w, lib}, nil
	}
	q.Codes = p11.Codes{uint(errTaken): {Class: pluginproto.ClassCaller, Exists: true}}
	return q
}

// do changes the world, or looks at it.
func (w *world) do(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func (w *world) step(name string) error {
	w.mu.Lock()
	before, err := w.before, w.fail[name]
	w.mu.Unlock()
	before(name)
	return err
}

// fake is one HSM of a world.
type fake struct {
	w   *world
	lib *pkcs11.Ctx
}

func (f *fake) Prepare() error {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	f.w.prepared++
	f.w.preparing()
	return f.w.prepare
}

func (f *fake) Describe(_ p11.Place, info *pluginproto.TokenInfo) error {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	info.Firmware, info.Cloning = "7.8.4", f.w.cloning
	return f.w.describe
}

func (f *fake) Facts(at p11.Place) ([]pluginproto.Fact, error) {
	info, err := f.lib.GetSessionInfo(at.Session)
	return []pluginproto.Fact{{Name: "slot", Value: fmt.Sprint(info.SlotID == at.Slot)}}, err
}

func (f *fake) UID(at p11.Place, object pkcs11.ObjectHandle) ([]byte, error) {
	if err := f.w.step("uid"); err != nil {
		return nil, err
	}
	got, err := f.lib.GetAttributeValue(at.Session, object, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, nil)})
	if err != nil {
		return nil, err
	}
	return f.uid(got[0].Value), nil
}

func (f *fake) ByUID(at p11.Place, uid []byte) (pkcs11.ObjectHandle, bool, error) {
	if f.w.blind {
		return 0, false, nil
	}
	return f.find(at, func(id []byte, _ pkcs11.ObjectHandle) bool { return slices.Equal(f.uid(id), uid) })
}

// find looks at the CKA_ID of every secret object on the token.
func (f *fake) find(at p11.Place, is func(id []byte, h pkcs11.ObjectHandle) bool) (pkcs11.ObjectHandle, bool, error) {
	for _, class := range []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY} {
		template := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_CLASS, class)}
		if err := f.lib.FindObjectsInit(at.Session, template); err != nil {
			return 0, false, err
		}
		all, _, err := f.lib.FindObjects(at.Session, 100)
		if err := errors.Join(err, f.lib.FindObjectsFinal(at.Session)); err != nil {
			return 0, false, err
		}
		for _, h := range all {
			got, err := f.lib.GetAttributeValue(at.Session, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, nil)})
			if err != nil || is(got[0].Value, h) {
				return h, err == nil, err
			}
		}
	}
	return 0, false, nil
}

// uid is what the HSM calls a key.
func (f *fake) uid(id []byte) []byte {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	if uid, ok := f.w.uids[string(id)]; ok {
		return uid
	}
	sum := sha256.Sum256(id)
	return sum[:12]
}

func (f *fake) Source(protocol string, at p11.Place, objects int) (p11.Source, error) {
	return &fakeSource{f.begin(protocol, at, objects)}, f.w.step("source begins")
}

func (f *fake) Target(protocol string, at p11.Place, objects int) (p11.Target, error) {
	return &fakeTarget{f.begin(protocol, at, objects)}, f.w.step("target begins")
}

func (f *fake) begin(protocol string, at p11.Place, objects int) end {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	e := end{f, protocol, at, objects, 0}
	f.w.open++
	f.w.lent = append(f.w.lent, e)
	return e
}

// sessions is how many sessions of transfers there are.
func (w *world) sessions() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.lent {
		if _, err := e.lib.GetSessionInfo(e.at.Session); err == nil {
			n++
		}
	}
	return n
}

// end is one end of a transfer. The protocol relay has three steps at each end, batch two,
// alone one; the objects travel with the source's last.
type end struct {
	*fake
	protocol string
	at       p11.Place
	objects  int
	step     int // the next
}

func (e *end) Close() { e.w.do(func() { e.w.open-- }) }

// enter begins a step and reports whether it is the last.
func (e *end) enter(who string) (last bool, err error) {
	err = e.w.step(fmt.Sprintf("%s %d", who, e.step))
	e.step++
	return e.step == steps[e.protocol], err
}

var steps = map[string]int{"relay": 3, "batch": 2, "alone": 1} // :: protocol → steps of each end; never written to

type fakeSource struct{ end }

func (s *fakeSource) Step(in []byte, give []pkcs11.ObjectHandle) ([]byte, bool, error) {
	last, err := s.enter("source")
	switch {
	case err != nil:
		return nil, false, err
	case (s.step > 1) != (string(in) == "go on"):
		return nil, false, fmt.Errorf("the target said %q", in)
	case !last:
		return []byte("go on"), false, nil
	}
	parcels := make([]parcel, len(give))
	for i, h := range give {
		if parcels[i], err = s.pack(s.at, h); err != nil {
			return nil, false, err
		}
	}
	out, err := json.Marshal(parcels)
	return out, true, err
}

type fakeTarget struct{ end }

// Due says so before the last step.
func (t *fakeTarget) Due() bool { return t.step+1 == steps[t.protocol] }

func (t *fakeTarget) Step(in []byte) ([]byte, []p11.Received, bool, error) {
	last, err := t.enter("target")
	switch {
	case err != nil:
		return nil, nil, false, err
	case !last && string(in) != "go on":
		return nil, nil, false, fmt.Errorf("the source said %q", in)
	case !last:
		return []byte("go on"), nil, false, nil
	}
	var parcels []parcel
	if err := json.Unmarshal(in, &parcels); err != nil || len(parcels) != t.objects {
		return nil, nil, false, fmt.Errorf("%d objects came where %d were announced: %v", len(parcels), t.objects, err)
	}
	received := make([]p11.Received, len(parcels))
	for i := range parcels {
		t.w.bend(&parcels[i])
		received[i].Object, received[i].Err = t.unpack(t.at, parcels[i])
	}
	err = t.w.step("target ends")
	if t.w.lost {
		return nil, nil, false, err
	}
	return nil, t.w.answer(received), true, err
}

// parcel is an object on its way.
type parcel struct {
	ID, Label, Wrapped []byte
	Class, CKK         uint
	Uses               map[uint]bool
	Stays              bool  // private and sensitive
	Fleeting           bool  // an object of the session
	Leaves             bool  // it can be extracted
	Err                error `json:"-"` // that it does not become an object
}

// uses are the attributes that go with an object.
var uses = []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY}

// shared is the key that all fakes wrap with.
var shared = sha256.Sum256([]byte("shared by all fakes"))

func (f *fake) kek(at p11.Place) (pkcs11.ObjectHandle, error) {
	return f.lib.CreateObject(at.Session, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_WRAP, true),
		pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, true), pkcs11.NewAttribute(pkcs11.CKA_VALUE, shared[:]),
	})
}

var kwp = []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP_PAD, nil)}

func (f *fake) pack(at p11.Place, h pkcs11.ObjectHandle) (p parcel, err error) {
	kek, err := f.kek(at)
	if err != nil {
		return p, err
	}
	if p.Wrapped, err = f.lib.WrapKey(at.Session, kwp, kek, h); err != nil {
		return p, err
	}
	p.Uses, p.Stays = map[uint]bool{}, true
	for _, a := range append([]uint{pkcs11.CKA_ID, pkcs11.CKA_LABEL, pkcs11.CKA_CLASS, pkcs11.CKA_KEY_TYPE}, uses...) {
		got, err := f.lib.GetAttributeValue(at.Session, h, []*pkcs11.Attribute{pkcs11.NewAttribute(a, nil)})
		if errors.Is(err, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_TYPE_INVALID)) {
			continue // a private key does not encrypt
		}
		if err != nil {
			return p, err
		}
		switch v := got[0].Value; a {
		case pkcs11.CKA_ID:
			p.ID = v
		case pkcs11.CKA_LABEL:
			p.Label = v
		case pkcs11.CKA_CLASS:
			p.Class = uint(binary.LittleEndian.Uint64(v))
		case pkcs11.CKA_KEY_TYPE:
			p.CKK = uint(binary.LittleEndian.Uint64(v))
		default:
			p.Uses[a] = v[0] != 0
		}
	}
	return p, nil
}

func (f *fake) unpack(at p11.Place, p parcel) (pkcs11.ObjectHandle, error) {
	if p.Err != nil {
		return 0, p.Err
	}
	template := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, p.Class), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, p.CKK),
		pkcs11.NewAttribute(pkcs11.CKA_ID, p.ID), pkcs11.NewAttribute(pkcs11.CKA_LABEL, p.Label),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, !p.Fleeting), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, p.Leaves),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, p.Stays), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, p.Stays),
	}
	for a, v := range p.Uses {
		template = append(template, pkcs11.NewAttribute(a, v))
	}
	if p.Class == pkcs11.CKO_SECRET_KEY {
		// SoftHSM 2.6.1 gives a key that it unwraps no CKA_VALUE_LEN.
		value, err := unwrapKWP(shared[:], p.Wrapped)
		if err != nil {
			return 0, err
		}
		return f.lib.CreateObject(at.Session, append(template, pkcs11.NewAttribute(pkcs11.CKA_VALUE, value)))
	}
	kek, err := f.kek(at)
	if err != nil {
		return 0, err
	}
	return f.lib.UnwrapKey(at.Session, kwp, kek, p.Wrapped, template)
}

// unwrapKWP is RFC 5649, section 4.2, for keys of more than 8 bytes.
func unwrapKWP(kek, in []byte) ([]byte, error) {
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, err
	}
	n := len(in)/8 - 1
	r := slices.Clone(in)
	var b [16]byte
	for t := 6 * n; t > 0; t-- {
		at := 8 * ((t-1)%n + 1)
		binary.BigEndian.PutUint64(b[:], binary.BigEndian.Uint64(r)^uint64(t))
		copy(b[8:], r[at:at+8])
		block.Decrypt(b[:], b[:])
		copy(r, b[:8])
		copy(r[at:], b[8:])
	}
	size := int(binary.BigEndian.Uint32(r[4:]))
	if binary.BigEndian.Uint32(r) != 0xA65959A6 || size > 8*n {
		return nil, errors.New("it does not unwrap")
	}
	return r[8 : 8+size], nil
}
