package lunasim

import (
	"bytes"
	"encoding/binary"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"
)

// The layout of struct state in src/state.h. Every field is a multiple of four bytes
// long, so both languages lay it out alike.
type state struct {
	Magic, Size uint32
	Firmware    [3]uint32
	Failed      [2]uint32
	Switches    [len(switches)]uint32
	Policies    [policies]uint32
	HSMPolicies [policies]uint32

	Capabilities, HSMCapabilities [policies]uint32

	Domains [maxDomains][36]byte
	Label   [36]byte
	Serial  [20]byte
	HALabel [36]byte
	PINs    [2][68]byte
	Faults  [faults]fault
}

type fault struct {
	Left, After, What, Arg, Fired uint32
	Function                      [44]byte
}

const (
	magic      = 0x314d5353
	policies   = 64
	maxDomains = 3
	faults     = 32
	noPolicy   = 1<<32 - 1 // the firmware does not know it

	activation     = 22
	autoActivation = 23
	allowCPv1      = 42
	allowNonFIPS   = 43
)

// Where fields are, in bytes.
const (
	firmwareAt    = int64(unsafe.Offsetof(state{}.Firmware))
	failedAt      = int64(unsafe.Offsetof(state{}.Failed))
	switchesAt    = int64(unsafe.Offsetof(state{}.Switches))
	tokenPolicyAt = int64(unsafe.Offsetof(state{}.Policies))
	hsmPolicyAt   = int64(unsafe.Offsetof(state{}.HSMPolicies))
	capabilityAt  = int64(unsafe.Offsetof(state{}.Capabilities))
	hsmCapableAt  = int64(unsafe.Offsetof(state{}.HSMCapabilities))
	domainsAt     = int64(unsafe.Offsetof(state{}.Domains))
	labelAt       = int64(unsafe.Offsetof(state{}.Label))
	haLabelAt     = int64(unsafe.Offsetof(state{}.HALabel))
	pinsAt        = int64(unsafe.Offsetof(state{}.PINs))
	faultsAt      = int64(unsafe.Offsetof(state{}.Faults))
	faultSize     = int64(unsafe.Sizeof(fault{}))
)

// aSwitch is one thing that Set changes, as src/state.h numbers it.
type aSwitch struct {
	name  string
	first uint32            // what it is to begin with
	words map[string]uint32 // :: word → value; numbers are taken as well
}

var yesNo = map[string]uint32{"no": 0, "yes": 1}

// switches are in the order of the enum in src/state.h. They are not changed.
var switches = [...]aSwitch{
	{"tampered", 0, yesNo},
	{"activated", 1, yesNo},
	{"deactivated_code", 0x80000020, nil},
	{"power", 0, nil},
	{"appid_shared", 0, yesNo},
	{"cu_session_objects", 1, yesNo},
	{"create_secrets", 1, yesNo},
	{"copy", 1, yesNo},
	{"gcm_iv", 0, map[string]uint32{"auto": 0, "caller": 1, "appended": 2, "params": 3, "refused": 4}},
	{"gcm_tag_code", 0x40, nil},
	{"gcm_iv_len", 16, nil},
	{"limit_objects", 0, nil},
	{"limit_bytes", 0, nil},
	{"login_limit", 10, nil},
	{"pin_flags", 1, yesNo},
	{"ha_slot", 0, yesNo},
	{"ha_only", 0, yesNo},
	{"strict_session", 1, yesNo},
	{"exists", 0, map[string]uint32{"refused": 0, "duplicate": 1, "overwrite": 2}},
	{"third_call", 0, map[string]uint32{"ok": 0, "error": 0x8000010c}},
	{"twc", 0xb, map[string]uint32{"any": 0, "twc3": 0xb, "ecc": 0xf}},
	{"kev", 0, map[string]uint32{"target": 0, "source": 1}},
	{"domain_code", 0x20, nil},
	{"clock", 1, yesNo},
	{"suites", 3, nil},
	{"tunnels_expired", 0, yesNo},
	{"smk", 0, nil},
	{"mfa", 0, yesNo},
	{"policies_kept", 0, yesNo},
}

func switchAt(name string) int64 {
	for i, s := range switches {
		if s.name == name {
			return switchesAt + 4*int64(i)
		}
	}
	return -1
}

// writeState makes the file that the library maps.
func (p *Partition) writeState(t testing.TB, path string, o Options) {
	t.Helper()
	s := state{Magic: magic, Size: uint32(unsafe.Sizeof(state{}))}
	for i, sw := range switches {
		s.Switches[i] = sw.first
	}
	s.Policies, s.HSMPolicies = policiesOf(o)
	s.Capabilities, s.HSMCapabilities = capabilitiesOf(o, s.Policies, s.HSMPolicies)
	for i := range policies {
		if s.Policies[i] == 1 && s.Capabilities[i] == 0 || s.HSMPolicies[i] == 1 && s.HSMCapabilities[i] == 0 {
			t.Fatalf("policy %d cannot be on: its capability is off", i)
		}
	}
	copy(s.Serial[:len(s.Serial)-1], o.Serial)
	copy(s.Label[:len(s.Label)-1], o.Label)
	copy(s.HALabel[:len(s.HALabel)-1], "ha-group")
	copy(s.PINs[0][:], p.PIN)
	copy(s.PINs[1][:], p.CUPIN)
	var b bytes.Buffer
	if err := binary.Write(&b, binary.NativeEndian, s); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(b.Bytes()); err != nil {
		t.Fatal(err)
	}
	p.state = f
	p.Set("firmware", firmwareOf(o))
	p.Set("domain", domainOf(o))
	if o.Kind == "sim" {
		p.Set("smk", "1")
	}
}

func firmwareOf(o Options) string {
	if o.Firmware == "" {
		return "7.8.0"
	}
	return o.Firmware
}

func domainOf(o Options) string {
	if o.Domain == "" {
		return "red"
	}
	return o.Domain
}

// policiesOf are the policies of a new partition and of its HSM. Those that the
// collected facts name are there; 1 is on.
func policiesOf(o Options) (partition, hsm [policies]uint32) {
	for i := range policies {
		partition[i], hsm[i] = noPolicy, noPolicy
	}
	for _, id := range []int{2, 6, 21, activation, autoActivation} {
		partition[id] = 1
	}
	for _, id := range []int{0, 1, 3, 4, 5, 7, 24, 37, 40, 41} {
		partition[id] = 0
	}
	switch o.Kind {
	case "export":
		partition[1], partition[5] = 1, 1
	case "sim":
		partition[3], partition[7] = 1, 1
	default:
		partition[0], partition[4] = 1, 1
	}
	if v, ok := parseFirmware(firmwareOf(o)); ok {
		if slices.Compare(v[:], []uint32{7, 7, 0}) >= 0 {
			partition[allowCPv1] = 0
		}
		if slices.Compare(v[:], []uint32{7, 7, 1}) >= 0 {
			partition[allowNonFIPS] = 1
		}
	}
	for _, id := range []int{7, 12, 16} {
		hsm[id] = 1
	}
	for id, v := range o.Policies {
		partition[id] = uint32(v)
	}
	for id, v := range o.HSMPolicies {
		hsm[id] = uint32(v)
	}
	return partition, hsm
}

// capabilitiesOf are what the policies may be set to: on, but for masking on a partition that
// does not mask, and for activation where no PED lets people in.
func capabilitiesOf(o Options, partition, hsm [policies]uint32) (partitionCan, hsmCan [policies]uint32) {
	for i := range policies {
		partitionCan[i], hsmCan[i] = partition[i]|1, hsm[i]|1 // what the firmware does not know stays so
	}
	for _, id := range []int{3, 7} {
		partitionCan[id] = partition[id]
	}
	if partition[activation] == 0 && o.Switches["mfa"] != "yes" {
		partitionCan[activation], partitionCan[autoActivation] = 0, partition[autoActivation]
	}
	for id, v := range o.Capabilities {
		partitionCan[id] = uint32(v)
	}
	for id, v := range o.HSMCapabilities {
		hsmCan[id] = uint32(v)
	}
	return partitionCan, hsmCan
}

func parseFirmware(s string) (v [3]uint32, ok bool) {
	parts := strings.Split(s, ".")
	if len(parts) != len(v) {
		return v, false
	}
	for i, part := range parts {
		n, err := strconv.ParseUint(part, 10, 8)
		if err != nil {
			return v, false
		}
		v[i] = uint32(n)
	}
	return v, true
}

func (p *Partition) write(at int64, value uint32) {
	p.t.Helper()
	p.writeBytes(at, binary.NativeEndian.AppendUint32(nil, value))
}

func (p *Partition) writeBytes(at int64, b []byte) {
	p.t.Helper()
	if _, err := p.state.WriteAt(b, at); err != nil {
		p.t.Fatal(err)
	}
}

func (p *Partition) read(at int64) uint32 {
	p.t.Helper()
	b := make([]byte, 4)
	if _, err := p.state.ReadAt(b, at); err != nil {
		p.t.Fatal(err)
	}
	return binary.NativeEndian.Uint32(b)
}
