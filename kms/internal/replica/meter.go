package replica

import (
	"math"
	"sync"
	"time"

	"kmsd/kms/api"
)

// tellEvery is the shortest time between two words on the progress of one member.
const tellEvery = 500 * time.Millisecond

// meter measures how fast work gets done. Its zero value is ready; methods may be
// called concurrently.
type meter struct {
	tell func(api.Progress) // called now and then while work gets done; nil: nobody listens

	mu    sync.Mutex // guards the rest
	p     api.Progress
	began time.Time // when the first work was added
	told  time.Time
}

// add says that there is more to do.
func (m *meter) add(n int) {
	if n == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.began.IsZero() {
		m.began = time.Now()
		m.told = m.began
	}
	m.p.Total = m.p.Done + n // what was not done before is in n again, or was refused
}

// done says that one piece is done.
func (m *meter) done() {
	m.mu.Lock()
	now := time.Now()
	m.p.Done++
	p, tell := m.atLocked(now), m.tell != nil && now.Sub(m.told) >= tellEvery
	if tell {
		m.told = now
	}
	m.mu.Unlock()
	if tell {
		m.tell(p)
	}
}

// progress returns how far the work has come; false when there never was any.
func (m *meter) progress() (api.Progress, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.atLocked(time.Now()), !m.began.IsZero()
}

// atLocked works out rate and time left.
func (m *meter) atLocked(now time.Time) api.Progress {
	p := m.p
	if took := now.Sub(m.began).Seconds(); took > 0 && p.Done > 0 {
		rate := float64(p.Done) / took
		p.Rate = math.Round(10*rate) / 10
		p.Left = api.Duration(math.Ceil(float64(p.Total-p.Done)/rate)) * api.Duration(time.Second)
	}
	return p
}
