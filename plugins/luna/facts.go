package main

import (
	"fmt"
	"slices"
	"strings"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/internal/vendor"
)

// facts returns what the policies and the client library make of a partition.
func (p partition) facts(o offer) []pluginproto.Fact {
	facts := []pluginproto.Fact{p.cloningFact(o)}
	if on, known := p.fips(); known {
		fips := pluginproto.Fact{Name: "FIPS mode", Value: "off"}
		switch {
		case on && p.policies.off(policyNonFIPS) && !p.hsm.off(hsmNonFIPS):
			fips.Value = "on, by policy 43 of the partition"
		case on:
			fips.Value = "on"
		}
		facts = append(facts, fips)
	}
	if len(o.lacking) > 0 {
		facts = append(facts, pluginproto.Fact{
			Name:    "lacks",
			Value:   "the client library lacks what these need: " + strings.Join(o.lacking, "; "),
			Warning: len(o.protocols) == 0 && o.barred == "",
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
	for _, kind := range []struct {
		clone, mask uint
		keys        string
	}{{policyPrivateCloning, policyPrivateMask, "private"}, {policySecretCloning, policySecretMask, "secret"}} {
		way := kind.clone
		if p.masks() {
			way = kind.mask
		}
		if p.policies.off(kind.clone) && p.policies.off(way) {
			fact.Warning = true
			fact.Value += fmt.Sprintf("; %s keys stay where they are: policy %d is off%s", kind.keys, way, p.remedy(way))
		}
	}
	return fact
}

// Facts implements [p11.Extension]. It asks the HSM for what changes, a few quick calls, and
// remembers the rest. What the HSM does not say is left out. It is an error that ends the
// connection when the partition is not any more what was told of it.
func (x *extension) Facts(at p11.Place) ([]pluginproto.Fact, error) {
	now := x.part.now(x.lib, at.Slot)
	if err := x.part.outdated(now, x.lib.Missing); err != nil {
		return nil, err
	}
	return x.factsOf(at, now)
}

// unseen says what is not known of a partition for want of a function.
func unseen(missing func(...vendor.Function) []vendor.Function) (all []string) {
	for _, view := range []struct {
		of   string
		need vendor.Function
	}{
		{"policies of the partition", vendor.GetTokenPolicies}, {"capabilities of the partition", vendor.GetTokenCapabilities},
		{"policies of the HSM", vendor.GetHSMPolicySet}, {"capabilities of the HSM", vendor.GetHSMCapabilitySet},
	} {
		if lack := missing(view.need); len(lack) > 0 {
			all = append(all, fmt.Sprintf("%s (%s)", view.of, join(lack)))
		}
	}
	return all
}

// factsOf returns the facts of a partition with these policies.
func (x *extension) factsOf(at p11.Place, p partition) ([]pluginproto.Fact, error) {
	o := p.offers(x.lib.Missing)
	o.lacking = append(o.lacking, unseen(x.lib.Missing)...)
	facts := p.facts(o)
	if x.box != nil {
		status, err := x.lib.Status(at.Slot, *x.box)
		switch {
		case err == nil:
			facts = append(facts, p.statusFacts(status)...)
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
	facts := p.activationFact(s)
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

// activationFact says how a partition is that a person with a key has to let others into. One
// that a password opens has neither the policy nor its capability (from memory): of that one
// there is nothing to say.
func (p partition) activationFact(s vendor.Status) []pluginproto.Fact {
	fact := pluginproto.Fact{Name: "activation", Warning: true}
	switch {
	case p.policies.off(policyActivation) && p.can.on(policyActivation):
		fact.Value = "not allowed, policy 22 is off: every start of the driver needs somebody at the HSM" + p.remedy(policyActivation)
	case !p.policies.on(policyActivation):
		return nil
	case !s.Activated:
		fact.Value = "not activated: activate the partition (lunacm: role login)"
	case p.policies.off(policyAutoActivation):
		fact.Value = "activated, but auto-activation (policy 23) is off: after a restart of the HSM somebody has to activate the partition" +
			p.remedy(policyAutoActivation)
	default:
		fact.Value, fact.Warning = "activated, and again by itself after a restart", false
	}
	return []pluginproto.Fact{fact}
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
