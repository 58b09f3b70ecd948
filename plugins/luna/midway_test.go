package main

import (
	"bytes"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/luna/lunasim"
)

// Each vendor's call of each protocol fails once, and once it is carried out while its answer
// is lost. The clone fails or goes well, what it leaves is a true copy or nothing, and the next
// one works.
func TestCallsThatFailMidway(t *testing.T) {
	for _, way := range ways {
		t.Run(way.protocol, func(t *testing.T) {
			domain := newDomain()
			from := openDriver(t, lunasim.New(t, way.options), domain, nil)
			to := openDriver(t, lunasim.New(t, way.options), domain, nil)
			n := byte(0)
			for _, function := range functionsOf(way.protocol) {
				for _, what := range []lunasim.What{lunasim.Answer, lunasim.Lose} {
					for _, typ := range []pluginproto.KeyType{pluginproto.AES256, pluginproto.ECP256} {
						n++
						id := pluginproto.KeyID{n}
						if _, err := from.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: typ}); err != nil {
							t.Fatal(err)
						}
						failsMidway(t, from, to, way.protocol, id, lunasim.Fault{What: what, Function: function, Arg: pkcs11.CKR_DEVICE_ERROR})
					}
				}
			}
			if made, came := len(list(t, from)), len(list(t, to)); made != int(n) || came != int(n) {
				t.Errorf("%d keys were made, %d are there, %d came", n, made, came)
			}
			if a, b := len(from.p.KeyBytes(t)), len(to.p.KeyBytes(t)); a != int(n) || b != int(n) {
				t.Errorf("%d keys were made, the partitions hold %d and %d", n, a, b)
			}
		})
	}
}

// functionsOf are the functions of a protocol by the names that the library has.
func functionsOf(protocol string) []string {
	if protocol == cpv1New {
		protocol = cpv1
	}
	var all []string
	for _, f := range needs[protocol] {
		all = append(all, f.String())
	}
	return all
}

// failsMidway clones a key while a call fails at both ends, and then again.
func failsMidway(t *testing.T, from, to *opened, protocol string, id pluginproto.KeyID, fault lunasim.Fault) {
	t.Helper()
	ids := []pluginproto.KeyID{id}
	faults := []*lunasim.Armed{from.p.Arm(fault), to.p.Arm(fault)}
	_, err := clone(t.Context(), from, to, protocol, ids, unchanged)
	fired := 0
	for _, f := range faults {
		fired += f.Fired()
		f.Disarm()
	}
	if fired == 0 {
		t.Errorf("%s was not called", fault.Function)
	}
	made, sourceErr := from.Inspect(t.Context(), id)
	came, targetErr := to.Inspect(t.Context(), id)
	switch {
	case sourceErr != nil:
		t.Errorf("%s: the source says: %v", fault.Function, sourceErr)
	case targetErr == nil && !bytes.Equal(made.CheckValue, came.CheckValue):
		t.Errorf("%s: another key has come", fault.Function)
	case targetErr == nil && err != nil && fault.What != lunasim.Lose:
		t.Errorf("%s: cloning: %v; the key is there nevertheless", fault.Function, err)
	case targetErr != nil && (err == nil || pluginproto.ClassOf(targetErr) != pluginproto.ClassNotFound):
		t.Errorf("%s: cloning: %v; then the target says: %v", fault.Function, err, targetErr)
	}
	if _, err := clone(t.Context(), from, to, protocol, ids, unchanged); err != nil {
		t.Errorf("%s, %d: the next clone: %v", fault.Function, fault.What, err)
	}
}

func list(t *testing.T, d *opened) []pluginproto.Object {
	t.Helper()
	all, err := d.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// A library whose negotiation ends with an error although the tunnel stands must not hide what
// becomes of the objects: an HSM in trouble is a failure of the member.
func TestADoubtDoesNotHideTrouble(t *testing.T) {
	domain := newDomain()
	from, to := openDriver(t, lunasim.New(t, lunasim.Options{}), domain, nil), openDriver(t, lunasim.New(t, lunasim.Options{}), domain, nil)
	to.p.Set("third_call", "error")
	id := pluginproto.KeyID{1}
	if _, err := from.Generate(t.Context(), pluginproto.KeySpec{ID: id, Type: pluginproto.AES256}); err != nil {
		t.Fatal(err)
	}
	for ckr, want := range map[uint32]pluginproto.Class{
		pkcs11.CKR_DEVICE_ERROR:           pluginproto.ClassMember,
		own + 0x2C:                        pluginproto.ClassBusy,    // the partition is full
		pkcs11.CKR_SESSION_HANDLE_INVALID: pluginproto.ClassUnknown, // begin another
	} {
		insert := to.p.Arm(lunasim.Fault{What: lunasim.Answer, Function: "CA_Insert", Arg: ckr})
		_, err := clone(t.Context(), from, to, cpv4, []pluginproto.KeyID{id}, unchanged)
		if pluginproto.ClassOf(err) != want || insert.Fired() != 1 {
			t.Errorf("%#x: %v, of class %s, want %s", ckr, err, pluginproto.ClassOf(err), want)
		}
		insert.Disarm()
	}
	if _, err := clone(t.Context(), from, to, cpv4, []pluginproto.KeyID{id}, unchanged); err != nil {
		t.Errorf("after that: %v", err)
	}
}
