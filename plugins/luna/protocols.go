package main

import (
	"fmt"
	"slices"
	"strings"

	"kmsd/pluginproto"
	"kmsd/plugins/luna/internal/vendor"
)

// The names of Luna's cloning protocols between drivers.
const (
	cpv1 = "cpv1" // CPv1 from any firmware
	// cpv1New is CPv1 from firmware 7.7.0 on. An HSM with it takes from older ones and
	// does not give to them, so what it gives has a name that they do not know.
	cpv1New = "cpv1-7.7"
	cpv3    = "cpv3"
	cpv4    = "cpv4"
	sim     = "sim"
)

// The firmware that the newer protocols begin with.
var (
	firmware77 = version3{7, 7, 0}
	firmware78 = version3{7, 8, 0}
)

// version3 is a firmware version.
type version3 [3]uint

func (v version3) atLeast(w version3) bool { return slices.Compare(v[:], w[:]) >= 0 }
func (v version3) String() string          { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

// needs are the functions of the library without which a protocol is not offered.
var needs = map[string][]vendor.Function{
	cpv1: {vendor.GetTokenCertificates, vendor.GenerateCloningKEV, vendor.CloneAsTargetInit, vendor.CloneAsSource, vendor.CloneAsTarget},
	cpv3: {vendor.CloneAsSourceInit, vendor.CloneAsTargetInit, vendor.CloneAsSource, vendor.CloneAsTarget},
	cpv4: {
		vendor.MigrationStartSessionNegotiation, vendor.MigrationContinueSessionNegotiation, vendor.MigrationCloseSession,
		vendor.Extract, vendor.Insert,
	},
	sim: {vendor.SIMExtract, vendor.SIMInsert},
}

// keysTogether is how many keys go in one transfer of a protocol that carries many: few
// enough for the blobs of the largest keys to fit into one message, and enough for the
// negotiation to weigh nothing.
const keysTogether = 50

// offer is how keys can leave a partition and come to it.
type offer struct {
	protocols []pluginproto.CloneProtocol // the best first
	barred    string                      // why none can, whatever the library has; "" when some can
	lacking   []string                    // what the library's missing functions cost: "cpv4 (CA_Extract)"
}

// offers says by which protocols keys can leave a partition and come to it.
func (p partition) offers(missing func(...vendor.Function) []vendor.Function) offer {
	var o offer
	add := func(need string, all ...pluginproto.CloneProtocol) {
		if lack := missing(needs[need]...); len(lack) > 0 {
			o.lacking = append(o.lacking, fmt.Sprintf("%s (%s)", need, join(lack)))
			return
		}
		o.protocols = append(o.protocols, all...)
	}
	if p.hsm.off(hsmReplication) {
		o.barred = "policy 16 of the HSM (network replication) is off" + p.hsmRemedy(hsmReplication)
		return o
	}
	switch {
	case p.hsm.off(hsmCloning):
		o.barred = "policy 7 of the HSM (cloning) is off" + p.hsmRemedy(hsmCloning)
	case p.policies.off(policyPrivateCloning) && p.policies.off(policySecretCloning):
		o.barred = "policies 0 and 4 of the partition (cloning of private and of secret keys) are off" +
			p.remedy(policyPrivateCloning, policySecretCloning)
	default:
		p.offerCloning(add)
	}
	if p.masks() {
		o.barred = ""
		add(sim, pluginproto.CloneProtocol{Name: sim, Gives: true, Takes: true, Alone: true, Keys: keysTogether})
	}
	return o
}

// offerCloning adds the cloning protocols, the best first.
func (p partition) offerCloning(add func(need string, all ...pluginproto.CloneProtocol)) {
	// Policy 42 on means CPv1 alone (read), and off means CPv1 not at all (inferred). An HSM
	// that cannot say has to try.
	forced := p.policies.on(policyCPv1)
	if p.firmware.atLeast(firmware78) && !forced {
		add(cpv4, pluginproto.CloneProtocol{Name: cpv4, Gives: true, Takes: true, Keys: keysTogether})
	}
	if p.firmware.atLeast(firmware77) && !forced {
		add(cpv3, pluginproto.CloneProtocol{Name: cpv3, Gives: true, Takes: true, Keys: 1})
	}
	old := pluginproto.CloneProtocol{Name: cpv1, Gives: true, Takes: true, Keys: 1}
	if !p.firmware.atLeast(firmware77) {
		add(cpv1, old)
		return
	}
	// With policy 42 off the offer to take from older firmware stands nevertheless: the
	// HSM's refusal says which policy to change, "nothing in common" would not.
	old.Gives = false
	if p.policies.off(policyCPv1) {
		add(cpv1, old)
		return
	}
	add(cpv1, pluginproto.CloneProtocol{Name: cpv1New, Gives: true, Takes: true, Keys: 1}, old)
}

func join[T fmt.Stringer](all []T) string {
	words := make([]string, len(all))
	for i, v := range all {
		words[i] = v.String()
	}
	return strings.Join(words, ", ")
}
