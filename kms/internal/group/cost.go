package group

import (
	"time"

	"kmsd/pluginproto"
)

// effort says how much work a command is for an HSM.
type effort uint8

const (
	small   effort = iota // symmetric, random, probe, a public-key operation
	curve                 // a private-key operation on a curve
	rsa                   // a private-key operation with RSA
	efforts               // how many there are
)

// commandCosts is how long a command keeps a token busy, in units of one symmetric
// command, by its effort. Costs are for choosing a member, so the order of magnitude
// is enough. With the SoftHSM driver a symmetric command takes 22 µs, a signature 73 µs
// with P-256, 0.7 ms with P-384, and 0.6, 2.3 or 4.8 ms with RSA-2048, -3072 or -4096
// (medians); a command does not tell the size of its key.
var commandCosts = [efforts]int{small: 1, curve: 4, rsa: 64} // never written to

// What other calls cost, in the same unit. With the SoftHSM driver a secret key or one
// on a curve takes 4 ms, most of it for the token's file, and a pair for RSA 0.15 s,
// 0.5 s or 1.3 s by its size, give or take a factor of three. So no command goes to a
// member that makes a pair while another one can serve, however busy that is.
const (
	costTransfer = 8 // one step of a clone, a lookup, a change of attributes
	costGenerate = 128
	costRSA2048  = 8_000
	costRSA3072  = 25_000
	costRSA4096  = 100_000
)

// slowLimit is how long one call for a pair of keys may take, for the list of all keys, or
// for one step of a clone of many. It is many times what SoftHSM needs for an RSA-4096 pair, because how long an
// HSM looks for primes has no bound. All other calls have the command timeout.
const slowLimit = 2 * time.Minute

// effortOf returns the effort of a command.
func effortOf(cmd pluginproto.Command) effort {
	if cmd.Op != pluginproto.OpSign && cmd.Op != pluginproto.OpDecrypt {
		return small
	}
	switch cmd.Mech {
	case pluginproto.RSAPKCS1v15, pluginproto.RSAPSS, pluginproto.RSAOAEP:
		return rsa
	case pluginproto.ECDSA:
		return curve
	default:
		return small
	}
}

// costOfKey returns the cost of making a key.
func costOfKey(t pluginproto.KeyType) int {
	switch t {
	case pluginproto.RSA2048:
		return costRSA2048
	case pluginproto.RSA3072:
		return costRSA3072
	case pluginproto.RSA4096:
		return costRSA4096
	default:
		return costGenerate
	}
}

// weigh returns what a call counts for when a member is chosen.
func (g *Group) weigh(cost int) int {
	if g.cfg.PlainCount {
		return 1
	}
	return cost
}
