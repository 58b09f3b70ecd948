// Package lunasim answers: what would a Thales Luna partition say to that?
//
// There is no Luna here, so the driver is tested against a double: a PKCS#11 library
// in C (src) that the tests compile, that keeps its objects in SoftHSM, and that holds
// to a Luna's rules: keys that never leave, OUIDs, three cloning protocols and SIM, two
// roles, policies, firmware, activation, storage. It is written from what is known of a
// Luna and not from the driver. Where nothing is known, or two readings are left, it is
// a switch, and the source calls it a guess.
//
// [New] makes a partition. Everything its library needs is found through the
// environment variable ChrystokiConfigurationPath, so a driver in a process of its own
// uses it as it would a Luna:
//
//	p := lunasim.New(t, lunasim.Options{Firmware: "7.7.1", Domain: "red"})
//	settings, pin := p.Settings(), p.PIN
//	p.Set("activated", "no")
//	p.Arm(lunasim.Fault{What: lunasim.Answer, Function: "C_Encrypt", Arg: 0x30})
//
// What Set and Arm say is in a file that every process with the partition open maps: it
// is seen at each process's next call. A partition is one SoftHSM token with copies of
// both libraries, so any number of them can be open in one process.
package lunasim

import (
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"kmsd/internal/softhsmtest"
)

// Options are what a partition is made with. The zero value is a partition of firmware
// 7.8.0 in the domain "red" that clones.
type Options struct {
	Label    string // of the token; "" means one of its own
	Serial   string // decimal digits; "" means one of its own
	Firmware string // "7.7.1"; "" means 7.8.0

	// Domain is the cloning domain, or up to three with commas between them, the
	// primary first; "" means "red" and "none" means that there is none.
	Domain string

	// Kind is how keys leave the partition: "cloning", which "" means too, "export"
	// (wrapped) or "sim" (masked).
	Kind string

	Policies    map[int]int // partition policies that differ from what Kind and Firmware bring
	HSMPolicies map[int]int // policies of the HSM that differ from "everything is allowed"

	// Capabilities that differ from "it can be switched on": of the partition, of the HSM. A
	// policy whose capability is 0 cannot be on.
	Capabilities, HSMCapabilities map[int]int

	Switches map[string]string // as for [Partition.Set]
	Without  []string          // vendor functions that the library does not have
}

// check fails the test for options that no partition has.
func (o Options) check(t testing.TB) {
	t.Helper()
	switch {
	case !slices.Contains([]string{"", "cloning", "export", "sim"}, o.Kind):
		t.Fatalf("there is no kind of partition %q", o.Kind)
	case len(o.Label) > 32 || len(o.Serial) > 15: // PKCS#11 2.40 section 3.2; a virtual slot's serial has a digit more
		t.Fatalf("the label %q or the serial %q is too long", o.Label, o.Serial)
	}
}

// Partition is one partition. Its methods may be called concurrently.
type Partition struct {
	Module string // path of the library, which is this partition's alone
	Conf   string // path of its Chrystoki.conf
	Label  string
	Serial string
	PIN    string // of the Crypto Officer
	CUPIN  string // of the Crypto User

	t       testing.TB
	state   *os.File
	store   string // softhsm2.conf
	softhsm string

	mu    sync.Mutex   // guards armed
	armed [faults]bool // :: slot of a fault → whether it is somebody's
}

// PINs of every partition made here. They guard nothing.
const (
	PIN   = "co-password-1"
	CUPIN = "cu-password-2"
)

// serials are given to partitions that were not given any.
var serials atomic.Uint64

// New makes a partition that vanishes with the test.
func New(t testing.TB, o Options) *Partition {
	t.Helper()
	n := serials.Add(1)
	if o.Serial == "" {
		o.Serial = fmt.Sprint(1154438865000 + n)
	}
	if o.Label == "" {
		o.Label = fmt.Sprintf("luna-%d", n)
	}
	o.check(t)
	store := softhsmtest.NewStore(t)
	store.Add(t, o.Label)
	dir := filepath.Dir(store.Conf)
	p := &Partition{
		Module: filepath.Join(dir, "libCryptoki2_64.so"), Conf: filepath.Join(dir, "Chrystoki.conf"),
		Label: o.Label, Serial: o.Serial, PIN: PIN, CUPIN: CUPIN,
		t: t, store: store.Conf, softhsm: filepath.Join(dir, "libsofthsm2.so"),
	}
	p.install(t, dir, o.Without)
	p.writeState(t, filepath.Join(dir, "partition.state"), o)
	p.writeConf(t, dir)
	for _, name := range slices.Sorted(maps.Keys(o.Switches)) {
		p.Set(name, o.Switches[name])
	}
	return p
}

// install copies both libraries: one that is loaded twice from one file is loaded once.
func (p *Partition) install(t testing.TB, dir string, without []string) {
	t.Helper()
	softhsm, err := os.ReadFile(softhsmtest.Module(t))
	if err != nil {
		t.Fatal(err)
	}
	built := compile(t, without)
	for path, content := range map[string][]byte{p.softhsm: softhsm, p.Module: built.library, filepath.Join(dir, "keydump"): built.keydump} {
		if err := os.WriteFile(path, content, 0o700); err != nil {
			t.Fatal(err)
		}
	}
}

func (p *Partition) writeConf(t testing.TB, dir string) {
	t.Helper()
	conf := fmt.Sprintf(`Chrystoki2 = {
   LibUNIX64 = %s;
}
LunaSim = {
   State = %s;
   Store = %s;
   SoftHSM = %s;
   Tokens = %s;
   Pin = %s;
}
`, p.Module, p.state.Name(), p.store, p.softhsm, filepath.Join(dir, "tokens"), softhsmtest.PIN)
	if err := os.WriteFile(p.Conf, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Settings are what a member with this partition is configured with.
func (p *Partition) Settings() map[string]string {
	return map[string]string{"module": p.Module, "token_label": p.Label, "token_serial": p.Serial, "chrystoki_conf": p.Conf}
}

// FailedLogins is how many wrong PINs the Crypto Officer has given in a row.
func (p *Partition) FailedLogins() int {
	p.t.Helper()
	return int(p.read(failedAt))
}

// PowerCycle takes the power away for a moment. Every session ends, and where the
// partition needs a person to activate it (the switch mfa), it stays activated by
// policy 23 alone.
func (p *Partition) PowerCycle() {
	p.t.Helper()
	if p.read(switchAt("mfa")) != 0 && p.read(tokenPolicyAt+4*autoActivation) != 1 {
		p.Set("activated", "no")
	}
	p.write(switchAt("power"), p.read(switchAt("power"))+1)
}

// KeyBytes returns the true bytes of every secret and private key on the token, by its
// CKA_ID in hexadecimal: the value, or an RSA key's private exponent.
func (p *Partition) KeyBytes(t testing.TB) map[string][]byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(filepath.Dir(p.Conf), "keydump"), p.softhsm, softhsmtest.PIN)
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+p.store)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("reading the keys of %s: %v", p.Label, err)
	}
	keys := map[string][]byte{}
	for line := range strings.Lines(string(out)) {
		id, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if keys[id], err = hex.DecodeString(value); err != nil || len(keys[id]) == 0 {
			t.Fatalf("reading the keys of %s: there is no value in %q", p.Label, id)
		}
	}
	return keys
}
