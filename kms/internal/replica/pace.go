package replica

import (
	"sync"
	"time"

	"kmsd/pluginproto"
)

// slowTransfer is how long a transfer may take before the next one to the member has half as
// many keys. An HSM may answer nobody else while it takes those of one, and a member that is
// silent for a probe interval, 2 s by default, is cut off from what it is at.
const slowTransfer = time.Second

// pace is how many keys a transfer to one member has. It outlives the attempts to bring the
// member in step: one that was cut off would be cut off at the same place again. The zero value
// is as many as the tokens can.
type pace struct {
	mu   sync.Mutex // guards most
	most int        // zero: no less than the tokens can
}

// atMost returns how many keys the next transfer has between tokens that can do so many.
func (p *pace) atMost(together int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.most == 0 {
		return together
	}
	return min(together, p.most)
}

// took takes down how long a transfer of so many keys took, or that it was cut off.
func (p *pace) took(keys int, d time.Duration, cutOff bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case cutOff || d > slowTransfer:
		p.most = max(keys/2, 2) // which is more in a transfer than one
	case keys < p.most || d > slowTransfer/4:
	case 2*p.most < pluginproto.MaxCloneKeys:
		p.most *= 2
	default:
		p.most = 0
	}
}
