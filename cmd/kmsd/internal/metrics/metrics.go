// Package metrics answers: what do the numbers say?
//
// [Metrics] is what Prometheus scrapes: the state of groups and members as
// [api.Status] tells it at that moment, the requests that [Metrics.Observe] has counted, and the
// Go runtime and process. States, groups and members have the names that status
// and events give them. No label holds the name of a key or of a principal, or anything
// else that a client chooses, but that of a database while it is rekeyed: the number of
// series is that of groups, members, operations, codes and jobs.
//
// docs/operations.md lists the metrics, testdata/names.txt fixes their names.
package metrics

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"

	"kmsd/kms/api"
)

// ContentType is that of [Metrics.Text]: the text format of Prometheus, version 0.0.4.
const ContentType = "text/plain; version=0.0.4; charset=utf-8"

// maxAge is for how long an answer serves for all who ask, so that whoever asks all the
// time costs four scrapes a second.
const maxAge = 250 * time.Millisecond

// Source tells the truth about groups and jobs, from memory: it never waits for an HSM.
type Source interface {
	Status() api.Status
	Ready() api.Readiness
	Jobs() []api.Job // those that have not ended, one of a database at most
}

// Metrics are all metrics of a kmsd. All methods may be called concurrently.
type Metrics struct {
	registry *prometheus.Registry
	requests *requests

	mu   sync.Mutex // guards the rest, and that one scrape is made at a time
	text []byte     // the last answer; never written to
	at   time.Time  // when it was made; zero: never yet
}

// New returns the metrics of a service. version is that of the program.
func New(source Source, version string) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry(), requests: newRequests()}
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "kmsd_build_info", Help: "Always 1; the labels say which program this is.",
	}, []string{"version", "go_version"})
	build.WithLabelValues(version, runtime.Version()).Set(1)
	m.registry.MustRegister( // it panics on names that collide, and these are fixed
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		build,
		groups{source},
		jobs{source},
	)
	m.requests.register(m.registry)
	return m
}

// Certificate shows when the certificate of the server ends. Without a TLS listener there
// is none.
func (m *Metrics) Certificate(end func() time.Time) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "kmsd_certificate_end_timestamp_seconds", Help: "When the certificate of the server ends, Unix time.",
	}, func() float64 { return unix(end()) }))
}

// Databases shows whether the listener for databases is open. Without one there is
// no such metric.
func (m *Metrics) Databases(open func() bool) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "kmsd_databases_open", Help: "1 while the listener for databases (vault: in kmsd.yaml) is open, else 0.",
	}, func() float64 { return truth(open()) }))
}

// Observe counts a request that has been answered: the action of its route, "ok" or the
// code of its error, how many items its batch had (0 when it was none), how many of them
// failed with which code although the request did not, and how long it took. Operations
// and outcomes have to be of a small fixed set. failed is only read.
func (m *Metrics) Observe(operation, outcome string, items int, failed map[api.Code]int, took time.Duration) {
	m.requests.observe(operation, outcome, items, failed, took)
}

// Text returns all metrics as [ContentType] says, at most 250 ms old. The caller must
// not write to it.
func (m *Metrics) Text() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.at.IsZero() && time.Since(m.at) < maxAge {
		return m.text, nil
	}
	families, err := m.registry.Gather()
	if len(families) == 0 { // what is there is worth more than none, when one metric is faulty
		return nil, errors.Join(errors.New("gathering metrics: there are none"), err)
	}
	var out bytes.Buffer
	enc := expfmt.NewEncoder(&out, expfmt.NewFormat(expfmt.TypeTextPlain))
	for _, f := range families {
		if err := enc.Encode(f); err != nil {
			return nil, fmt.Errorf("encoding metric %s: %w", f.GetName(), err)
		}
	}
	m.text, m.at = out.Bytes(), time.Now()
	return m.text, nil
}
