package main

import (
	"fmt"
	"slices"
	"strings"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/internal/vendor"
)

// facts returns what does not change while the driver is connected.
func (p partition) facts(o offer) []pluginproto.Fact {
	facts := []pluginproto.Fact{p.cloningFact(o)}
	if value, known := p.hsm[hsmNonFIPS]; known {
		fips := pluginproto.Fact{Name: "FIPS mode", Value: "on"}
		if value != 0 {
			fips.Value = "off"
		}
		facts = append(facts, fips)
	}
	if len(o.lacking) > 0 {
		facts = append(facts, pluginproto.Fact{
			Name:    "lacks",
			Value:   "the client library lacks what these need: " + strings.Join(o.lacking, "; "),
			Warning: len(o.protocols) == 0,
		})
	}
	return facts
}

func (p partition) cloningFact(o offer) pluginproto.Fact {
	fact := pluginproto.Fact{Name: "cloning"}
	if len(o.protocols) == 0 {
		fact.Warning = true
		fact.Value = "none: "
		if o.barred != "" {
			fact.Value += o.barred
		} else {
			fact.Value += "the client library has no function for it"
		}
		return fact
	}
	var names []string
	for _, c := range o.protocols {
		switch {
		case c.Gives && c.Takes:
			names = append(names, c.Name)
		case c.Takes:
			names = append(names, c.Name+" (from older firmware)")
		}
	}
	fact.Value = strings.Join(names, ", ")
	if p.masks() {
		return fact
	}
	for _, kind := range []struct {
		policy uint
		keys   string
	}{{policyPrivateCloning, "private"}, {policySecretCloning, "secret"}} {
		if p.policies.off(kind.policy) {
			fact.Warning = true
			fact.Value += fmt.Sprintf("; %s keys stay where they are: policy %d is off", kind.keys, kind.policy)
		}
	}
	return fact
}

// Facts implements [p11.Extension]. It asks the HSM for what changes, two quick calls, and
// remembers the rest. What the HSM does not say is left out.
func (x *extension) Facts(at p11.Place) ([]pluginproto.Fact, error) {
	facts := slices.Clone(x.stands)
	if x.box != nil {
		status, err := x.lib.Status(at.Slot, *x.box)
		switch {
		case err == nil:
			facts = append(facts, x.part.statusFacts(status)...)
		case !withheld(err):
			return nil, err
		}
	}
	room, err := x.storage(at)
	switch {
	case err == nil && !unavailable(room.Total, room.Free, room.Objects):
		facts = append(facts, storageFact(room))
	case err != nil && !withheld(err):
		return nil, err
	}
	return facts, nil
}

func (x *extension) storage(at p11.Place) (vendor.Storage, error) {
	if x.box != nil && x.lib.Has(vendor.GetContainerStorageInformation) {
		return x.lib.ContainerStorage(at.Slot, *x.box)
	}
	return x.lib.TokenStorage(at.Slot)
}

func (p partition) statusFacts(s vendor.Status) []pluginproto.Fact {
	var facts []pluginproto.Fact
	if p.policies.on(policyActivation) {
		activation := pluginproto.Fact{Name: "activation", Value: "activated, and again by itself after a restart"}
		switch {
		case !s.Activated:
			activation.Value, activation.Warning = "not activated: activate the partition (lunacm: role login)", true
		case p.policies.off(policyAutoActivation):
			activation.Warning = true
			activation.Value = "activated, but auto-activation (policy 23) is off: after a restart of the HSM somebody has to activate the partition"
		}
		facts = append(facts, activation)
	}
	if unavailable(s.OfficerFails, s.UserFails) {
		return facts
	}
	logins := pluginproto.Fact{Name: "failed logins", Value: "none"}
	if s.OfficerFails+s.UserFails > 0 {
		logins.Warning = true
		logins.Value = fmt.Sprintf("%d as Crypto Officer, %d as Crypto User: somebody tries wrong PINs; at the limit the role is locked",
			s.OfficerFails, s.UserFails)
	}
	return append(facts, logins)
}

// unavailable reports whether any of some numbers is none: CK_UNAVAILABLE_INFORMATION of
// PKCS#11, all bits set, in the library's width or in the firmware's.
func unavailable(numbers ...uint) bool {
	return slices.Contains(numbers, 1<<64-1) || slices.Contains(numbers, 1<<32-1)
}

// lowStorage is the part of a partition, in percent, below which its room is low.
const lowStorage = 10

func storageFact(s vendor.Storage) pluginproto.Fact {
	fact := pluginproto.Fact{Name: "storage", Value: fmt.Sprintf("%d objects, %d of %d bytes free", s.Objects, s.Free, s.Total)}
	if s.Total > 0 && s.Free < s.Total/100*lowStorage {
		fact.Warning = true
		fact.Value += ": destroy what is not needed, or make the partition larger"
	}
	return fact
}
