package kms

import (
	"context"
	"maps"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

const (
	// idle is the longest pause between two rounds of a janitor.
	idle = time.Minute
	// soon is the pause before it tries again what has failed. It doubles with each
	// failure, up to late.
	soon = 5 * time.Second
	late = 30 * time.Second
	// lookEvery is the time between two comparisons of a member in step with the
	// catalog, for what came to its token around this service.
	lookEvery = time.Hour
	// choreTimeout bounds one chore, and with it how long it holds the lease.
	choreTimeout = time.Minute
	// maxRefusals is how many copies a member may fail to take in one round before the
	// rest waits for the next.
	maxRefusals = 3
)

// janitor does for one group what nobody waits for: it takes back versions that
// were left half made, destroys what is due or was destroyed while a member could
// not be asked, rotates what is due, gives members in step the copies they lack, and
// looks now and then whether they still hold what they should. One goroutine owns it; everybody else only leaves word and wakes it.
type janitor struct {
	kms  *KMS
	g    *keyGroup
	log  hclog.Logger
	call chan struct{} // holds one token while there is a reason to look

	// Of the one goroutine:
	failures int                  // rounds in a row that could not be finished
	looked   time.Time            // when the members were last compared
	told     map[string]complaint // :: chore → what was last said of it, until it succeeds
	rekeyed  map[string]int       // :: database → version of its master key for which it needs no rekey any more

	mu        sync.Mutex      // guards the rest
	suspects  map[string]bool // keys whose last operation has an open end
	unsettled bool            // some tombstone is pending on a member in step
	lost      map[loss]bool   // copies that a member in step was found not to have
}

// complaint is what the log says of a chore that could not be finished.
type complaint struct {
	text string
	at   time.Time
}

// loss is a copy that a member should have and has not.
type loss struct {
	key     string
	version int
	member  string
}

func newJanitor(k *KMS, g *keyGroup, log hclog.Logger) *janitor {
	return &janitor{
		kms: k, g: g, log: log, call: make(chan struct{}, 1),
		suspects: make(map[string]bool), lost: make(map[loss]bool), told: make(map[string]complaint), rekeyed: make(map[string]int),
		unsettled: true, // by an earlier process
		looked:    time.Now(),
	}
}

// wake has the janitor look around soon.
func (j *janitor) wake() { wake(j.call) }

// suspect says that an operation on a key has an open end.
func (j *janitor) suspect(key string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.suspects[key] = true
	j.wake()
}

// settleLater says that a member in step could not destroy something.
func (j *janitor) settleLater() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.unsettled = true
}

// missing says that a member in step was found not to have a copy. Saying it again
// before the copy is back, or the member has moved, costs nothing.
func (j *janitor) missing(l loss) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, known := j.lost[l]; !known {
		j.lost[l] = false
		j.wake()
	}
}

// moved says that a member has come into step or has been lost; what it holds was
// or will be compared with the catalog.
func (j *janitor) moved(member string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	maps.DeleteFunc(j.lost, func(l loss, _ bool) bool { return l.member == member })
	j.wake()
}

// forget says that a member has left, or is another HSM now.
func (j *janitor) forget(member string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	maps.DeleteFunc(j.lost, func(l loss, _ bool) bool { return l.member == member })
}

// run makes rounds until ctx ends: when woken, when something is due, and once a
// minute.
func (j *janitor) run(ctx context.Context) {
	for ctx.Err() == nil {
		pause := min(idle, time.Until(j.round(ctx)))
		if pause <= 0 {
			continue
		}
		timer := time.NewTimer(pause)
		select {
		case <-j.call:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// round does all that is to be done now and returns when the next is due, which may be over:
// what has become due during the round may have been passed over.
func (j *janitor) round(ctx context.Context) (next time.Time) {
	began, failed := time.Now(), false
	for _, chore := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"taking back what was left half made", j.clearUp},
		{"settling tombstones", j.settle},
		{"destroying what is due", j.destroyDue},
		{"rotating what is due", j.rotateDue},
		{"rekeying what was rotated", j.rekeyDue},
		{"noting lost copies", j.noteLost},
		{"bringing over missing copies", j.heal},
		{"looking for what has changed on tokens", j.look},
	} {
		err := chore.do(ctx)
		if ctx.Err() != nil {
			return next // nobody waits for the rest
		}
		failed = failed || err != nil
		j.tell(chore.what, err)
	}
	j.failures++
	if !failed {
		j.failures = 0
	} else {
		next = time.Now().Add(min(late, soon<<min(j.failures-1, 8)))
	}
	if due := j.nextDue(began); next.IsZero() || due.Before(next) {
		return due
	}
	return next
}

// tell says why a chore could not be finished. Whoever asks for what fails wakes the
// janitor each time, so that it speaks of a chore every few seconds at most, and says the
// same once a minute.
func (j *janitor) tell(chore string, err error) {
	if err == nil {
		delete(j.told, chore)
		return
	}
	next := complaint{err.Error(), time.Now()}
	if last, ok := j.told[chore]; ok {
		since := next.at.Sub(last.at)
		if since < soon || (last.text == next.text && since < idle) {
			return
		}
	}
	j.told[chore] = next
	j.log.Warn("janitor could not finish", "chore", chore, "error", err)
}
