package lunasim

import (
	"strconv"
	"strings"
)

// Set changes a switch, and every process that has the partition open sees it at its
// next call. A name or value that there is not fails the test.
//
//	firmware            "7.7.1"
//	domain              "red", "red,blue" (the primary first), "none"
//	label, ha_label     of the token, of the virtual slot's
//	pin, cu_pin         of the Crypto Officer, of the Crypto User; "" is a role without one
//	policy.42, hsm.12   a policy of the partition, of the HSM: "0", "unknown", or, where its
//	                    capability is on, "1"
//	policies_kept       yes | no: a process is told the policies as they were when it began
//
//	activated           yes | no: nobody is let in, and who is in is put out
//	deactivated_code    what C_Login then answers: 0x80000020, 0x101
//	mfa                 yes | no: a PED lets people in: only where policy 22 is on, and after a
//	                    power cycle only where policy 23 is
//	tampered            yes | no: every call answers 0x80000076
//	login_limit         wrong PINs until the lock (10)
//	pin_flags           yes | no: the token's flags say how many tries are left
//	appid_shared        yes | no: another process with our application ID is logged in
//	cu_session_objects  yes | no: the Crypto User may make session objects
//	create_secrets      yes | no: C_CreateObject takes key values for session objects
//	copy                yes | no: C_CopyObject is allowed
//	gcm_iv              auto | caller | appended | params | refused; auto is appended in FIPS mode
//	gcm_tag_code        what a ciphertext that does not authenticate is answered with: 0x40, 0x5
//	gcm_iv_len          bytes of the IV that comes back in the parameter: 12 or 16
//	limit_objects, limit_bytes   what there is room for; 0 is no limit
//	ha_slot, ha_only    yes | no: there is a virtual slot, and only that one is shown
//
//	strict_session      yes | no: any other call on the session breaks a transfer
//	exists              refused | duplicate | overwrite: what cloning an OUID that is there does
//	third_call          ok | error: what the third CPv4 call answers although the tunnel stands
//	clock               yes | no: the HSM's clock is set, which CPv4 needs
//	suites              bits of the cipher suites of CPv4 (3)
//	tunnels_expired     yes | no: the CPv4 sessions that stand have run out
//	twc                 any | twc3 | ecc: the certificate type of CPv1
//	kev                 target | source: who makes the KEV of CPv1
//	domain_code         what a key of another domain is answered with by CPv1 and CPv3 (0x20)
//	smk                 number of the SIM masking key; 0 is none
func (p *Partition) Set(name, value string) {
	p.t.Helper()
	kind, id, _ := strings.Cut(name, ".")
	switch kind {
	case "firmware":
		v, ok := parseFirmware(value)
		if !ok {
			p.t.Fatalf("there is no firmware %q", value)
		}
		for i, n := range v {
			p.write(firmwareAt+4*int64(i), n)
		}
	case "domain":
		p.setDomains(value)
	case "label":
		p.setText(labelAt, 36, value)
	case "ha_label":
		p.setText(haLabelAt, 36, value)
	case "pin":
		p.setText(pinsAt, 68, value)
	case "cu_pin":
		p.setText(pinsAt+68, 68, value)
	case "policy":
		p.setPolicy(tokenPolicyAt, capabilityAt, id, value)
	case "hsm":
		p.setPolicy(hsmPolicyAt, hsmCapableAt, id, value)
	default:
		p.setSwitch(name, value)
	}
}

func (p *Partition) setSwitch(name, value string) {
	p.t.Helper()
	at := switchAt(name)
	if at < 0 {
		p.t.Fatalf("there is no switch %q", name)
	}
	v, ok := switches[(at-switchesAt)/4].words[value]
	if !ok {
		n, err := strconv.ParseUint(value, 0, 32)
		if err != nil {
			p.t.Fatalf("the switch %s has no value %q", name, value)
		}
		v = uint32(n)
	}
	p.write(at, v)
}

func (p *Partition) setPolicy(set, capabilities int64, id, value string) {
	p.t.Helper()
	n, err := strconv.Atoi(id)
	if err != nil || n < 0 || n >= policies {
		p.t.Fatalf("there is no policy %q", id)
	}
	v := uint64(noPolicy)
	if value != "unknown" {
		if v, err = strconv.ParseUint(value, 10, 32); err != nil {
			p.t.Fatalf("policy %s has no value %q", id, value)
		}
	}
	if v != 0 && v != noPolicy && p.read(capabilities+4*int64(n)) == 0 {
		p.t.Fatalf("policy %s cannot be on: its capability is off", id)
	}
	p.write(set+4*int64(n), uint32(v))
}

func (p *Partition) setDomains(value string) {
	p.t.Helper()
	names := strings.Split(value, ",")
	if value == "none" {
		names = nil
	}
	if len(names) > maxDomains {
		p.t.Fatalf("a partition has at most %d domains", maxDomains)
	}
	for i := range maxDomains {
		name := ""
		if i < len(names) {
			name = names[i]
		}
		p.setText(domainsAt+36*int64(i), 36, name)
	}
}

// setText writes a string into a field of so many bytes, the last of which is a NUL.
func (p *Partition) setText(at int64, size int, value string) {
	p.t.Helper()
	if len(value) >= size {
		p.t.Fatalf("%q has more than %d bytes", value, size-1)
	}
	b := make([]byte, size)
	copy(b, value)
	p.writeBytes(at, b)
}
