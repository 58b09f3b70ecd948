package pluginproto

import "slices"

// CloneProtocol is one way in which keys go from token to token. Two tokens use the first
// of the source's that the target knows by the same name.
type CloneProtocol struct {
	Name  string // of the driver's choice: "aes-kwp", "cpv4"
	Gives bool   // keys can leave the token so
	Takes bool   // keys can come to it so
	Alone bool   // the source is done after step 0, and its blob is all that a target needs, so that it can be kept
	Keys  int    // how many keys one transfer carries, 1 to MaxCloneKeys

	// BySecret says that the domain secret is all that two tokens have to have in common
	// for it, so that an equal DomainCheck proves that they understand each other. Where
	// it is false, only a clone does.
	BySecret bool
}

// CommonProtocol returns the protocol by which keys go from a source with these protocols
// to a target with those; false when there is none.
func CommonProtocol(from, to []CloneProtocol) (CloneProtocol, bool) {
	for _, p := range from {
		at := slices.IndexFunc(to, func(q CloneProtocol) bool { return q.Name == p.Name && q.Takes })
		if p.Gives && at >= 0 {
			p.Keys, p.BySecret = min(p.Keys, to[at].Keys), p.BySecret && to[at].BySecret
			return p, true
		}
	}
	return CloneProtocol{}, false
}

// CloneRole says which end of a clone a driver is.
type CloneRole uint8

const (
	CloneSource CloneRole = 1
	CloneTarget CloneRole = 2
)

// CloneRequest is one step of a clone at one end.
type CloneRequest struct {
	Transfer [16]byte // random, the same for all steps at both ends
	Role     CloneRole
	Protocol string  // the same for all steps at both ends
	Step     int     // counts up from 0 at each end
	Keys     []KeyID // which keys, none twice, the same for all steps at both ends
	Blob     []byte  // what the other end answered; nil at the source's step 0

	// Prove makes the target prove what a blob holds, and keep none of it: its HSM takes
	// the key in, computes its check value, and lets it go. The token is as it was
	// before, whatever it holds under the identity. It works with one key and a protocol
	// whose blobs stand alone; every other is refused with ClassCaller.
	Prove bool

	// End says that the transfer is over, well or not: the driver lets go of what it
	// keeps for it. The core sends it to an end that has not said Done. It has no step
	// and no blob, and the answer is empty, even when the driver knows nothing of the
	// transfer. A driver ends by itself what nobody goes on with.
	End bool
}

// CloneReply is what one step gives to the other end.
type CloneReply struct {
	Blob []byte
	Done bool // this end has nothing more to do

	// Keys has an answer for each key, in the order of the request. At the source with
	// step 0: the key as it is there, which the core compares before the target gets any
	// of it. At the target, with Done: the key as it is there now, or as it was proved.
	Keys []CloneResult
}

// CloneResult is what has become of one key of a transfer.
type CloneResult struct {
	// Object is the key; nil when Err is not.
	Object *Object
	// Err is what is wrong with this key alone, while others of the same transfer go on.
	// When a transfer has one key, it is the error of the call instead.
	Err error
}
