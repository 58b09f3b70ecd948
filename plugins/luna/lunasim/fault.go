package lunasim

import "math"

// What a fault does.
type What uint32

const (
	CloseSessions What = iota + 1 // every session of the process ends, before the call
	Logout                        // the process is logged out, before the call
	Answer                        // Arg is the answer; the call is not carried out
	Hang                          // before the call, until Disarm
	Sleep                         // Arg milliseconds, before the call
	Lose                          // the call is carried out, and Arg is the answer
)

// Forever is the number of times of a fault that lasts until it is disarmed.
const Forever = math.MaxUint32

// Fault is what happens to calls of one function, PKCS#11's or the vendor's.
type Fault struct {
	What     What
	Function string // "C_Encrypt"; "*" is any that takes a session, but not for Lose
	After    uint32 // calls that pass before the first that it happens to
	Times    uint32 // calls that it happens to; 0 means 1
	Arg      uint32
}

// Armed is a fault that waits for its calls.
type Armed struct {
	p    *Partition
	slot int
}

// Offsets in a fault.
const (
	leftAt     = 0
	afterAt    = 4
	whatAt     = 8
	argAt      = 12
	firedAt    = 16
	functionAt = 20
)

// Arm makes a fault happen, in whichever process the call is made. It happens as often
// as it says however many processes there are.
func (p *Partition) Arm(f Fault) *Armed {
	p.t.Helper()
	a := &Armed{p: p, slot: p.claim()}
	if f.Times == 0 {
		f.Times = 1
	}
	if f.What == Hang {
		f.Arg = 1
	}
	for _, field := range []struct {
		at    int64
		value uint32
	}{{leftAt, 0}, {afterAt, f.After}, {whatAt, uint32(f.What)}, {argAt, f.Arg}, {firedAt, 0}} {
		p.write(a.at(field.at), field.value)
	}
	p.setText(a.at(functionAt), int(faultSize-functionAt), f.Function)
	p.write(a.at(leftAt), f.Times)
	return a
}

func (p *Partition) claim() int {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, taken := range p.armed {
		if !taken {
			p.armed[i] = true
			return i
		}
	}
	p.t.Fatalf("%d faults are armed already: disarm some", faults)
	return 0
}

func (a *Armed) at(field int64) int64 { return faultsAt + int64(a.slot)*faultSize + field }

// Disarm ends the fault, and the calls that hang by it go on. It is called once.
func (a *Armed) Disarm() {
	a.p.t.Helper()
	a.p.write(a.at(leftAt), 0)
	a.p.write(a.at(argAt), 0)
	a.p.mu.Lock()
	defer a.p.mu.Unlock()
	a.p.armed[a.slot] = false
}

// Fired is how often the fault has happened.
func (a *Armed) Fired() int { return int(a.p.read(a.at(firedAt))) }

// Left is how often it will yet happen.
func (a *Armed) Left() int { return int(a.p.read(a.at(leftAt))) }
