package p11_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"kmsd/internal/faultlib"
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

// begin takes the first step at each end of a transfer of one key.
func (e *ends) begin(t testing.TB, id pluginproto.KeyID) *relay {
	t.Helper()
	r := e.relay("relay", id)
	if _, err := r.give(t); err != nil {
		t.Fatal(err)
	}
	if _, err := r.take(t); err != nil {
		t.Fatal(err)
	}
	return r
}

// unknown wants a transfer to be known no more.
func unknown(t testing.TB, err error) {
	t.Helper()
	if err == nil || pluginproto.ClassOf(err) != pluginproto.ClassUnknown || !strings.Contains(err.Error(), "begin another") {
		t.Errorf("going on with the transfer: %v", err)
	}
}

func TestATransferThatIsOverLeavesNothing(t *testing.T) {
	e := newEnds(t)
	id := generate(t, e.from, pluginproto.AES256).ID
	for name, over := range map[string]func(*relay) error{
		"ended": func(r *relay) error {
			r.end(t)
			_, err := r.give(t)
			return err
		},
		"gone on with at another step": func(r *relay) error {
			defer r.end(t)
			r.source.Step = 2
			if _, err := r.give(t); pluginproto.ClassOf(err) != pluginproto.ClassCaller {
				t.Errorf("another step: %v", err)
			}
			r.source.Step = 1
			_, err := r.give(t)
			return err
		},
		"gone on with another key": func(r *relay) error {
			defer r.end(t)
			right := r.source.Keys
			r.source.Keys = []pluginproto.KeyID{newID()}
			if _, err := r.give(t); pluginproto.ClassOf(err) != pluginproto.ClassCaller {
				t.Errorf("another key: %v", err)
			}
			r.source.Keys, r.source.Step = right, 1
			_, err := r.give(t)
			return err
		},
		"gone on with a blob of its own": func(r *relay) error {
			defer r.end(t)
			r.source.Blob = r.target.Blob
			if _, err := r.give(t); pluginproto.ClassOf(err) != pluginproto.ClassCaller || !strings.Contains(err.Error(), "another end") {
				t.Errorf("its own blob: %v", err)
			}
			r.source.Step = 1
			_, err := r.give(t)
			return err
		},
		"finished": func(r *relay) error {
			for range 2 {
				if _, err := r.give(t); err != nil {
					t.Fatal(err)
				}
				if _, err := r.take(t); err != nil {
					t.Fatal(err)
				}
			}
			if err := e.to.Destroy(t.Context(), id); err != nil {
				t.Error(err)
			}
			_, err := r.take(t)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			unknown(t, over(e.begin(t, id)))
			e.clean(t, id)
		})
	}
}

// Nobody has to end a transfer for it to end.
func TestATransferThatIsLeftAlone(t *testing.T) {
	e := &ends{world: newWorld(), bench: newBench(t, "token-a", "token-b")}
	e.bench.settings["module"] = sealedLibrary(t, e.bench.settings["module"])
	e.from = p11.New(e.quirks(), p11.Options{})
	e.from.SetIdle(20 * time.Millisecond) // which may be over before the first step at the target is
	e.openOn(t, e.from, "token-a")
	e.to = e.start(t, "token-b")
	id := generate(t, e.from, pluginproto.ECP256).ID
	r := e.begin(t, id)
	for look := time.NewTicker(time.Millisecond); e.from.Transfers() > 0; <-look.C {
		// The limit of all tests ends it when nothing else does.
	}
	if n := e.to.Transfers(); n != 1 {
		t.Errorf("the target, which waits longer, knows %d transfers", n)
	}
	if n := e.sessions(); n != 1 {
		t.Errorf("%d sessions of the transfer are open, want the target's", n)
	}
	_, err := r.give(t)
	unknown(t, err)
	r.end(t)
	e.clean(t, id)
}

// When too many transfers are under way a new one waits: did it end the oldest, which is the
// next to go on, none would ever come to an end.
func TestTooManyTransfers(t *testing.T) {
	e := newEnds(t)
	id := generate(t, e.from, pluginproto.AES256).ID
	var all []*relay
	for range p11.MaxTransfers {
		all = append(all, e.begin(t, id))
	}
	late := e.relay("relay", id)
	if _, err := late.give(t); pluginproto.ClassOf(err) != pluginproto.ClassBusy {
		t.Errorf("one more: %v", err)
	}
	for _, r := range all {
		if _, err := r.give(t); err != nil {
			t.Errorf("one that was there: %v", err)
		}
	}
	all[0].end(t)
	late.source.Step = 0
	if _, err := late.give(t); err != nil {
		t.Errorf("when one has ended: %v", err)
	}
	for _, r := range append(all[1:], late) {
		r.end(t)
	}
	e.clean(t, id)
}

// One that nobody goes on with gives way.
func TestATransferThatIsLeftAloneGivesWay(t *testing.T) {
	e := newEnds(t)
	id := generate(t, e.from, pluginproto.AES256).ID
	var all []*relay
	for range p11.MaxTransfers {
		all = append(all, e.begin(t, id))
	}
	e.from.Age(30 * time.Minute) // the sweep takes an hour, another one a quarter of it
	if _, err := all[1].give(t); err != nil {
		t.Error(err)
	}
	late := e.relay("relay", id)
	if _, err := late.give(t); err != nil {
		t.Errorf("one more: %v", err)
	}
	if n := e.from.Transfers(); n != p11.MaxTransfers {
		t.Errorf("%d transfers wait", n)
	}
	for _, r := range append(all, late) {
		r.end(t)
	}
	e.clean(t, id)
}

func TestClosingADriverEndsItsTransfers(t *testing.T) {
	e := newEnds(t)
	e.begin(t, generate(t, e.from, pluginproto.AES256).ID)
	for _, d := range []*p11.Driver{e.from, e.to} {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if e.open != 0 {
		t.Errorf("%d ends are open", e.open)
	}
}

// What is lost between two calls into the library costs the transfer at most: the next one
// works, and nothing but a whole, true key is ever there.
func TestAFaultAtEveryMomentOfATransfer(t *testing.T) {
	lib := faultlib.Build(t, "faulty")[0]
	e := &ends{world: newWorld(), bench: newBench(t, "token-a", "token-b")}
	e.bench.settings["module"] = sealedLibrary(t, lib.Path)
	made := map[pluginproto.KeyType]pluginproto.Object{}
	first := e.start(t, "token-a")
	for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.ECP256} {
		made[typ] = generate(t, first, typ)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	for _, fault := range []struct {
		name string
		what faultlib.What
		ckr  uint32
	}{
		{"sessions are closed", faultlib.CloseSessions, 0},
		{"the device fails", faultlib.Answer, pkcs11.CKR_DEVICE_ERROR},
	} {
		for typ, o := range made {
			t.Run(fault.name+", "+string(typ), func(t *testing.T) { e.faults(t, lib, faultlib.Fault{What: fault.what, Arg: fault.ckr}, o) })
		}
	}
}

func (e *ends) faults(t *testing.T, lib *faultlib.Library, fault faultlib.Fault, o pluginproto.Object) {
	moments := 0
	for after := uint32(0); after < 300; after += 7 {
		e.from, e.to = e.start(t, "token-a"), e.start(t, "token-b")
		fault.Function, fault.After = "*", after
		lib.Arm(t, 0, fault)
		_, err := e.relay("batch", o.ID).run(t)
		fired := lib.Fired(t, 0)
		lib.Disarm(t, 0)
		if class := pluginproto.ClassOf(err); err != nil && (class == pluginproto.ClassCaller || class == pluginproto.ClassNotFound) {
			t.Errorf("before call %d: %v, which blames the key", after, err)
		}
		// A driver whose token failed is replaced by a new one.
		if err := errors.Join(e.from.Close(), e.to.Close()); err != nil {
			t.Fatal(err)
		}
		e.from, e.to = e.start(t, "token-a"), e.start(t, "token-b")
		if got, err := e.to.Inspect(t.Context(), o.ID); err == nil && string(got.CheckValue) != string(o.CheckValue) {
			t.Errorf("before call %d: another key is there", after)
		}
		e.arrives(t, o)
		if err := e.to.Destroy(t.Context(), o.ID); err != nil {
			t.Error(err)
		}
		if err := errors.Join(e.from.Close(), e.to.Close()); err != nil {
			t.Fatal(err)
		}
		if fired == 0 {
			break
		}
		moments++
	}
	t.Logf("%d moments", moments)
	if moments < 8 {
		t.Error("it proves nothing below 8")
	}
}

func TestRequestsThatNoTransferIs(t *testing.T) {
	e := newEnds(t)
	id := generate(t, e.from, pluginproto.AES256).ID
	w := e.world
	w.do(func() {
		w.cloning = []pluginproto.CloneProtocol{{Name: "out", Gives: true, Keys: 1}, {Name: "in", Takes: true, Keys: 1}}
	})
	if err := e.to.Close(); err != nil {
		t.Fatal(err)
	}
	e.to = e.start(t, "token-b")
	for _, tc := range []struct {
		name string
		d    *p11.Driver
		req  pluginproto.CloneRequest
		want string
	}{
		{"a protocol that is not there", e.from, pluginproto.CloneRequest{Role: 1, Protocol: "aes-kwp", Keys: []pluginproto.KeyID{id}}, `no protocol "aes-kwp" here, only: relay, batch, alone`},
		{"no role", e.from, pluginproto.CloneRequest{Protocol: "batch", Keys: []pluginproto.KeyID{id}}, "no role 0"},
		{"no keys", e.from, pluginproto.CloneRequest{Role: 1, Protocol: "batch"}, "0 keys in one transfer, batch carries 50"},
		{"too many keys", e.from, pluginproto.CloneRequest{Role: 1, Protocol: "relay", Keys: []pluginproto.KeyID{id, newID()}}, "2 keys in one transfer, relay carries 1"},
		{"a first blob for a source", e.from, pluginproto.CloneRequest{Role: 1, Protocol: "batch", Keys: []pluginproto.KeyID{id}, Blob: []byte("x")}, "the source takes no blob"},
		{"a proof of what has several steps", e.from, pluginproto.CloneRequest{Role: 2, Protocol: "batch", Keys: []pluginproto.KeyID{id}, Prove: true}, "cannot prove"},
		{"nothing for a target", e.from, pluginproto.CloneRequest{Role: 2, Protocol: "batch", Keys: []pluginproto.KeyID{id}}, "0 bytes"},
		{"keys for a token that only gives", e.to, pluginproto.CloneRequest{Role: 2, Protocol: "out", Keys: []pluginproto.KeyID{id}}, "cannot come to this token by out"},
		{"keys from a token that only takes", e.to, pluginproto.CloneRequest{Role: 1, Protocol: "in", Keys: []pluginproto.KeyID{id}}, "cannot leave this token by in"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := tc.d.CloneStep(t.Context(), tc.req)
			if pluginproto.ClassOf(err) != pluginproto.ClassCaller || err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
	e.clean(t)
}
