package metrics

import (
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kmsd/kms/api"
)

// requests counts what clients have asked. It is on the path of every request, so a
// request that is like one before finds its counters without a lock.
type requests struct {
	total    *prometheus.CounterVec
	items    *prometheus.CounterVec
	duration *prometheus.HistogramVec

	known atomic.Pointer[map[outcome]counters] // replaced whole, never written to
	mu    sync.Mutex                           // guards that one replaces it at a time
}

// outcome is how a request of an operation ended.
type outcome struct{ operation, code string }

type counters struct {
	total, items prometheus.Counter
	duration     prometheus.Observer
}

func newRequests() *requests {
	operation := []string{"operation"}
	r := &requests{
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kmsd_requests_total",
			Help: "Requests that were answered, by the action of their route and by \"ok\" or the code of their error.",
		}, []string{"operation", "outcome"}),
		items: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kmsd_request_items_total",
			Help: "What those requests asked for, the items of a batch or else one each, by \"ok\" or the code of its error.",
		}, []string{"operation", "outcome"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "kmsd_request_duration_seconds",
			Help:    "From the header of a request to its answer, the record in the audit log included.",
			Buckets: bounds(),
		}, operation),
	}
	r.known.Store(&map[outcome]counters{})
	return r
}

func (r *requests) register(to prometheus.Registerer) { to.MustRegister(r.total, r.items, r.duration) }

func (r *requests) observe(operation, code string, items int, failed map[api.Code]int, took time.Duration) {
	items = max(items, 1)
	for code, n := range failed {
		r.of(outcome{operation, string(code)}).items.Add(float64(n))
		items -= n
	}
	c := r.of(outcome{operation, code})
	c.total.Inc()
	c.items.Add(float64(items))
	c.duration.Observe(took.Seconds())
}

func (r *requests) of(o outcome) counters {
	if c, ok := (*r.known.Load())[o]; ok {
		return c
	}
	return r.meet(o)
}

// meet makes the counters of an outcome that is seen for the first time.
func (r *requests) meet(o outcome) counters {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := counters{
		total:    r.total.WithLabelValues(o.operation, o.code),
		items:    r.items.WithLabelValues(o.operation, o.code),
		duration: r.duration.WithLabelValues(o.operation),
	}
	next := maps.Clone(*r.known.Load())
	next[o] = c
	r.known.Store(&next)
	return c
}

// bounds are those of all histograms here, in seconds.
func bounds() []float64 {
	b := make([]float64, len(api.LatencyBounds))
	for i, d := range api.LatencyBounds {
		b[i] = d.Seconds()
	}
	return b
}
