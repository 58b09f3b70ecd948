package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"kmsd/pluginproto"
	"kmsd/plugins/luna/internal/vendor"
)

// Policies of a partition and of an HSM, Thales' CONTAINER_CONFIG_* and HSM_CONFIG_*. Each has
// a capability of the same number, without which nobody can switch it on (read).
const (
	policyPrivateCloning = 0
	policyPrivateWrap    = 1
	policyPrivateMask    = 3 // inferred from its place in Thales' table
	policySecretCloning  = 4
	policySecretWrap     = 5
	policySecretMask     = 7
	policyActivation     = 22
	policyAutoActivation = 23
	policyCPv1           = 42
	policyNonFIPS        = 43 // from firmware 7.7.1 on

	hsmCloning     = 7
	hsmNonFIPS     = 12
	hsmReplication = 16
)

// policies are settings of a partition or an HSM, or what they may be set to; nil when they
// cannot be read.
type policies map[uint]uint // :: policy → value

func (p policies) on(id uint) bool  { return p[id] != 0 }
func (p policies) off(id uint) bool { v, known := p[id]; return known && v == 0 }

// now returns p as it is now. What is not told now stays as it was, and what was not told at
// first is not taken: a reading that comes and goes must not make the member come and go.
func (p policies) now(is policies) policies {
	next := maps.Clone(p)
	for id := range next {
		if v, known := is[id]; known {
			next[id] = v
		}
	}
	return next
}

// changes names the policies that are others now.
func (p policies) changes(is policies, of string) (all []string) {
	for _, id := range slices.Sorted(maps.Keys(p)) {
		if is[id] != p[id] {
			all = append(all, fmt.Sprintf("policy %d of the %s was %d and is %d", id, of, p[id], is[id]))
		}
	}
	return all
}

// partition is what decides how keys leave a partition and come to it.
type partition struct {
	firmware      version3
	policies, hsm policies
	can, hsmCan   policies // their capabilities, which firmware and licences change and nobody else
}

// keyExport reports whether keys leave the partition wrapped, and no other way: what is made
// there to stay inside of HSMs can never reach a second one.
func (p partition) keyExport() bool {
	wraps := p.policies.on(policyPrivateWrap) || p.policies.on(policySecretWrap)
	return wraps && p.policies.off(policyPrivateCloning) && p.policies.off(policySecretCloning) && !p.masks()
}

// masks reports whether keys leave the partition as SIM blobs.
func (p partition) masks() bool {
	return p.policies.on(policyPrivateMask) || p.policies.on(policySecretMask)
}

// fips reports whether the partition is in FIPS mode, which the HSM's policy imposes on all of
// its partitions and a partition's own on that one (read). Without either it is not known.
func (p partition) fips() (on, known bool) {
	_, all := p.hsm[hsmNonFIPS]
	_, one := p.policies[policyNonFIPS]
	return p.hsm.off(hsmNonFIPS) || p.policies.off(policyNonFIPS), all || one
}

// remedy says of policies of the partition that are off whether they can be switched on, and
// how. It goes behind what names them, and is "" where the HSM does not say.
func (p partition) remedy(off ...uint) string {
	return remedy(p.can, off, "the partition", "lunacm: partition changepolicy", "the keys in it")
}

// hsmRemedy says the same of policies of the HSM.
func (p partition) hsmRemedy(off ...uint) string {
	return remedy(p.hsmCan, off, "the HSM", "lunash: hsm changepolicy", "its partitions")
}

// remedy is in the words of Thales' documents, by which such a change may delete what there is.
func remedy(can policies, off []uint, of, command, content string) (text string) {
	var may, never, on []string
	for _, id := range off {
		switch number := fmt.Sprint(id); {
		case can.off(id):
			never = append(never, number)
		case can.on(id):
			may, on = append(may, number), append(on, "1")
		}
	}
	if len(may) > 0 {
		text = fmt.Sprintf("; %s's capabilities allow it for %s: ask its security officer (%s -policy %s -value %s), and mind that it may delete %s",
			of, strings.Join(may, " and "), command, strings.Join(may, ","), strings.Join(on, ","), content)
	}
	if len(never) > 0 {
		text += fmt.Sprintf("; %s's capabilities forbid it for %s, so nobody can switch that on", of, strings.Join(never, " and "))
	}
	return text
}

// readPolicies reads what a partition's policies are and what they can be. Without the policies
// an HSM in trouble would be taken for one that keeps them to itself; capabilities are for good
// advice alone, and nothing that is answered for them keeps a member away.
func readPolicies(lib *vendor.Library, slot uint) (p partition, err error) {
	if p.policies, err = lib.TokenPolicies(slot); err != nil && !withheld(err) {
		return partition{}, err
	}
	if p.hsm, err = lib.HSMPolicies(slot); err != nil && !withheld(err) {
		return partition{}, err
	}
	p.can, _ = lib.TokenCapabilities(slot)
	p.hsmCan, _ = lib.HSMCapabilities(slot)
	return p, nil
}

// now returns the partition with the policies that it has now. That they cannot be read changes
// nothing: whether the HSM works is for commands to find out. Nor does a client library that
// goes on to tell what it has read first, as LunaCM does (read); such a change shows at the next
// connect.
func (p partition) now(lib *vendor.Library, slot uint) partition {
	if is, err := lib.TokenPolicies(slot); err == nil {
		p.policies = p.policies.now(is)
	}
	if is, err := lib.HSMPolicies(slot); err == nil {
		p.hsm = p.hsm.now(is)
	}
	return p
}

// outdated returns an error where policies that were changed make something else of the
// partition than was told of it at the connect: other cloning protocols, or FIPS mode, which
// decides on mechanisms and IVs. The error has the member connected anew, once, because a new
// driver begins with the policies as they are.
func (p partition) outdated(is partition, missing func(...vendor.Function) []vendor.Function) error {
	wasFIPS, _ := p.fips()
	isFIPS, _ := is.fips()
	if wasFIPS == isFIPS && slices.Equal(p.offers(missing).protocols, is.offers(missing).protocols) {
		return nil
	}
	changes := append(p.policies.changes(is.policies, "partition"), p.hsm.changes(is.hsm, "HSM")...)
	return pluginproto.Errorf(pluginproto.ClassMember, "looking at the policies again",
		"%s; a new driver tells what the partition can do now", strings.Join(changes, ", "))
}
