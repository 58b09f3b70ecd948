package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/internal/vendor"
	"kmsd/plugins/luna/lunasim"
)

// end is a partition that is open in this process, below the engine: without its frames and
// without what it checks.
type end struct {
	*pkcs11.Ctx
	*extension
	p    *lunasim.Partition
	slot uint
	h    pkcs11.SessionHandle
	info pluginproto.TokenInfo
}

// openEnd opens a partition as its Crypto Officer.
func openEnd(t testing.TB, o lunasim.Options) *end {
	t.Helper()
	e := loadEnd(t, lunasim.New(t, o))
	info, err := e.GetTokenInfo(e.slot)
	if err != nil {
		t.Fatal(err)
	}
	e.info.Firmware = fmt.Sprintf("%d.%d", info.FirmwareVersion.Major, info.FirmwareVersion.Minor)
	if err := e.Describe(e.place(), &e.info); err != nil {
		t.Fatalf("describing the partition: %v", err)
	}
	return e
}

// loadEnd is openEnd without a look at what the partition says of itself.
func loadEnd(t testing.TB, p *lunasim.Partition) *end {
	t.Helper()
	was, had := os.LookupEnv("ChrystokiConfigurationPath")
	if err := os.Setenv("ChrystokiConfigurationPath", filepath.Dir(p.Conf)); err != nil { // C's environment, too
		t.Fatal(err)
	}
	defer func() {
		if had {
			_ = os.Setenv("ChrystokiConfigurationPath", was)
		}
	}()
	e := &end{Ctx: pkcs11.New(p.Module), p: p}
	if e.Ctx == nil {
		t.Fatal("the library cannot be loaded")
	}
	t.Cleanup(e.Destroy)
	lib, err := vendor.Load(p.Module)
	if err != nil {
		t.Fatal(err)
	}
	e.extension = &extension{lib: lib}
	if err := e.Initialize(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Finalize() })
	if err := e.Prepare(); err != nil {
		t.Fatal(err)
	}
	slots, err := e.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	e.slot = slots[0]
	e.h = e.session(t)
	if err := e.Login(e.h, pkcs11.CKU_USER, p.PIN); err != nil {
		t.Fatal(err)
	}
	return e
}

func (e *end) place() p11.Place { return p11.Place{Slot: e.slot, Session: e.h} }

func (e *end) session(t testing.TB) pkcs11.SessionHandle {
	t.Helper()
	h, err := e.OpenSession(e.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func attr(kind uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(kind, value) }

// keyTemplate is what the engine makes keys with.
func keyTemplate(id string) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, true), attr(pkcs11.CKA_SENSITIVE, true),
		attr(pkcs11.CKA_EXTRACTABLE, false), attr(pkcs11.CKA_ID, []byte(id)), attr(pkcs11.CKA_LABEL, id),
	}
}

// aes makes a secret key.
func (e *end) aes(t testing.TB, id string) pkcs11.ObjectHandle {
	t.Helper()
	o, err := e.GenerateKey(e.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, append(keyTemplate(id),
		attr(pkcs11.CKA_VALUE_LEN, 32), attr(pkcs11.CKA_ENCRYPT, true), attr(pkcs11.CKA_DECRYPT, true)))
	if err != nil {
		t.Fatalf("making a key: %v", err)
	}
	return o
}

// ec makes a pair and returns its private half.
func (e *end) ec(t testing.TB, id string) pkcs11.ObjectHandle {
	t.Helper()
	p256 := []byte{6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7}
	_, private, err := e.GenerateKeyPair(e.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
		[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_ID, []byte(id)), attr(pkcs11.CKA_EC_PARAMS, p256), attr(pkcs11.CKA_VERIFY, true)},
		append(keyTemplate(id), attr(pkcs11.CKA_SIGN, true)))
	if err != nil {
		t.Fatalf("making a pair: %v", err)
	}
	return private
}

// find returns the secret and private keys with an ID, or all of them.
func (e *end) find(t testing.TB, id string) []pkcs11.ObjectHandle {
	t.Helper()
	template := []*pkcs11.Attribute{attr(pkcs11.CKA_PRIVATE, true)}
	if id != "" {
		template = append(template, attr(pkcs11.CKA_ID, []byte(id)))
	}
	if err := e.FindObjectsInit(e.h, template); err != nil {
		t.Fatal(err)
	}
	found, _, err := e.FindObjects(e.h, 4096)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.FindObjectsFinal(e.h); err != nil {
		t.Fatal(err)
	}
	return found
}

// transfer relays between two ends.
type transfer struct {
	protocol string
	alter    func(n int, said []byte) []byte // of the word n of both; nil: leaves them as they are
	heard    [][]byte                        // all words, as they were said
}

// run moves objects from one partition to another as the engine does, in sessions of the
// transfer's own.
func (x *transfer) run(t testing.TB, from, to *end, objects ...pkcs11.ObjectHandle) ([]p11.Received, error) {
	t.Helper()
	hs, ht := from.session(t), to.session(t)
	defer func() { _ = from.CloseSession(hs) }()
	defer func() { _ = to.CloseSession(ht) }()
	source, err := from.Source(x.protocol, p11.Place{Slot: from.slot, Session: hs}, len(objects))
	if err != nil {
		return nil, err
	}
	defer source.Close()
	target, err := to.Target(x.protocol, p11.Place{Slot: to.slot, Session: ht}, len(objects))
	if err != nil {
		return nil, err
	}
	defer target.Close()

	var give []pkcs11.ObjectHandle
	if x.protocol == sim {
		give = objects
	}
	var said []byte
	for step, over := 0, false; !over; step++ {
		if said, over, err = source.Step(said, give); err != nil {
			return nil, fmt.Errorf("source, step %d: %w", step, err)
		}
		said = x.hear(said)
		var received []p11.Received
		var done bool
		if said, received, done, err = target.Step(said); err != nil {
			return nil, fmt.Errorf("target, step %d: %w", step, err)
		}
		if done {
			return received, nil
		}
		said = x.hear(said)
		give = objects
	}
	return nil, fmt.Errorf("%s comes to no end", x.protocol)
}

func (x *transfer) hear(said []byte) []byte {
	x.heard = append(x.heard, bytes.Clone(said))
	if x.alter != nil {
		said = x.alter(len(x.heard)-1, bytes.Clone(said))
	}
	return said
}

// arrives wants objects to have come, each under its ID and once.
func arrives(t testing.TB, to *end, received []p11.Received, err error, ids ...string) {
	t.Helper()
	if err != nil {
		t.Fatalf("cloning: %v", err)
	}
	if len(received) != len(ids) {
		t.Fatalf("%d objects came of %d", len(received), len(ids))
	}
	for i, r := range received {
		if r.Err != nil {
			t.Fatalf("object %d: %v", i, r.Err)
		}
		if found := to.find(t, ids[i]); len(found) != 1 || found[0] != r.Object {
			t.Errorf("under %s there is %v, received was %d", ids[i], found, r.Object)
		}
	}
}
