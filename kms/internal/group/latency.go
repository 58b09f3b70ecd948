package group

import (
	"math/bits"
	"time"

	"kmsd/kms/api"
)

const (
	octaves     = 24                 // 8 µs to 2^27 µs, over two minutes
	perOctave   = 8                  // buckets in each: an error of at most an eighth
	fineBuckets = perOctave          // 0 to 7 µs, one bucket each
	memory      = 2048               // answers after which the older ones count half
	longest     = 1<<(octaves+3) - 1 // µs, in the last bucket
)

// latency is a histogram of recent answer times. The zero value is empty. It has
// no lock of its own.
type latency struct {
	counts [fineBuckets + octaves*perOctave]uint32
	total  uint32
}

func (h *latency) add(d time.Duration) {
	h.counts[bucket(d)]++
	h.total++
	if h.total < memory {
		return
	}
	h.total = 0
	for i := range h.counts {
		h.counts[i] /= 2
		h.total += h.counts[i]
	}
}

// quantile returns the time within which the share q of the answers came, 0 when
// there were none. It rounds up to the end of a bucket.
func (h *latency) quantile(q float64) time.Duration {
	if h.total == 0 {
		return 0
	}
	want := uint32(q * float64(h.total))
	var sum uint32
	for i, n := range h.counts {
		if sum += n; n > 0 && sum >= want {
			return upperEnd(i)
		}
	}
	return upperEnd(len(h.counts) - 1)
}

func bucket(d time.Duration) int {
	us := uint64(min(max(d.Microseconds(), 0), longest))
	if us < fineBuckets {
		return int(us)
	}
	octave := bits.Len64(us) - 1 // at least 3
	return (octave-2)*perOctave + int(us>>(octave-3))&(perOctave-1)
}

// upperEnd is the largest time that falls into a bucket.
func upperEnd(i int) time.Duration {
	if i < fineBuckets {
		return time.Duration(i) * time.Microsecond
	}
	octave, sub := i/perOctave+2, i%perOctave
	us := (perOctave+sub+1)<<(octave-3) - 1
	return time.Duration(us) * time.Microsecond
}

// observe adds an answer to a histogram that is never forgotten.
func observe(h *api.Histogram, d time.Duration) {
	h.Count++
	h.Sum += d
	for i, bound := range api.LatencyBounds {
		if d <= bound {
			h.Buckets[i]++
			return
		}
	}
}
