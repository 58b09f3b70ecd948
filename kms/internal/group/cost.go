package group

import "kmsd/pluginproto"

// Costs say how long a call keeps a token busy, in units of one symmetric
// command. They are for choosing a member, so the order of magnitude is enough.
const (
	costSmall    = 1  // symmetric, random, probe, a public-key operation
	costCurve    = 4  // a private-key operation on a curve
	costRSA      = 16 // a private-key operation with RSA
	costTransfer = 8  // one step of a clone, a lookup, a change of attributes
	costGenerate = 64 // making a key, up to a pair for RSA
)

// costOf returns the cost of a command.
func costOf(cmd pluginproto.Command) int {
	if cmd.Op != pluginproto.OpSign && cmd.Op != pluginproto.OpDecrypt {
		return costSmall
	}
	switch cmd.Mech {
	case pluginproto.RSAPKCS1v15, pluginproto.RSAPSS, pluginproto.RSAOAEP:
		return costRSA
	case pluginproto.ECDSA:
		return costCurve
	default:
		return costSmall
	}
}
