// Package kms answers: which version of which master key?
//
// It is a key management service over groups of HSMs, in this process. A program
// that talks to a kmsd over HTTP uses kmsd/kms/client instead; both implement
// [Service], so code written for one works with the other.
//
// # Nouns
//
// A master [Key] has a name, belongs to a group of HSMs and never leaves them. It
// has versions; the newest enabled one wraps, every enabled one unwraps. A data key
// is what a database encrypts its pages with: it is wrapped under a master key and
// kept by the database as an envelope. An envelope names the version that made it and
// carries everything else that is needed to unwrap it; it is bound to the caller's
// aad, which has to be given again. A copy is one version on one member of the group.
//
// # The common path
//
//	k, err := kms.Open(ctx, cfg)                            // the groups, in this process
//	key, err := k.CreateMasterKey(ctx, "shop", kms.KeyOptions{})
//	wrapped, err := k.Wrap(ctx, "shop", dek, aad)           // keep wrapped beside the data
//	dek, err := k.Unwrap(ctx, "shop", wrapped, aad)
//	version, err := k.Rotate(ctx, "shop")                   // old envelopes still unwrap
//	wrapped, err = k.Rewrap(ctx, "shop", wrapped, aad)      // under the new version
//
// # What holds while HSMs fail
//
// A key is acknowledged when at least min_copies members hold it, and the answer
// names them; until then it does not exist. Wrap and unwrap run on any member that
// has the key and move to another one when it fails, so a caller sees a failure only
// when no member is left ([ErrGroupLost]) or its time is over ([ErrDeadline]). A key
// that was made, or destroyed, while a member was away is brought over to it, or
// destroyed on it, before it serves again.
//
// # Caveats
//
// [ErrNotFound] is certain: the catalog has no such key. A member that does not know
// a key the catalog knows is never taken for proof; that is [ErrUnavailable] at
// worst.
//
// A key operation whose context ends is taken back in the background. Its caller may
// see [ErrDeadline] and the key may yet exist, when the deadline fell into the last
// step: look before you create it again.
//
// A destroyed key keeps its name and its version numbers for ever. What was wrapped
// with it is lost.
//
// The catalog belongs to one [KMS] at a time, and with it the groups: it is written
// by no other process meanwhile.
package kms
