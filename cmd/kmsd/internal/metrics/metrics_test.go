package metrics_test

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"kmsd/cmd/kmsd/internal/metrics"
	"kmsd/internal/leaktest"
	"kmsd/kms/api"
)

var update = flag.Bool("update", false, "write testdata/names.txt anew")

func TestMain(m *testing.M) { leaktest.Main(m) }

// source is a service whose status a test sets.
type source struct {
	mu     sync.Mutex // guards the rest
	status api.Status
	ready  api.Readiness
	jobs   []api.Job
	asked  int
}

func (s *source) Status() api.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	return s.status
}

func (s *source) Ready() api.Readiness {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ready
}

func (s *source) Jobs() []api.Job {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.jobs
}

var since = time.Date(2026, 11, 21, 3, 4, 5, 250e6, time.UTC)

// example is a group with one member that serves and one that is being brought back.
func example() *source {
	served := api.Histogram{Count: 7, Sum: 3 * time.Second}
	served.Buckets[0], served.Buckets[3], served.Buckets[16] = 3, 2, 1 // and one took longer
	return &source{
		jobs: []api.Job{
			{Database: "crm", State: api.JobRunning, Started: since, Progress: api.Progress{Done: 30, Total: 120, Rate: 4.5, Left: api.Duration(20 * time.Second)}},
			{Database: "erp", State: api.JobWaiting, Started: since, Progress: api.Progress{Done: 7, Total: 9}, Failed: 2},
		},
		ready: api.Readiness{Ready: true, Members: []api.MemberReadiness{{Group: "default", Member: "hsm-a", OK: true, Last: since}}},
		status: api.Status{Groups: []api.Group{{
			Name: "default", State: api.GroupSole, Primary: "hsm-a", MinCopies: 2, Keys: 12, BelowMinCopies: 3, WithoutCopy: 1, WearingOut: 4,
			Members: []api.Member{
				{
					Name: "hsm-a", Driver: "softhsm", Role: api.RoleActive, State: api.MemberActive, Since: since,
					InFlight: 4, Commands: 1234, Errors: 5, Keys: 11, Missing: 1, Foreign: 2, Quarantined: 3, Latency: served,
					Token: api.Token{Facts: []api.Fact{{Name: "storage", Value: "97 % used", Warning: true}, {Name: "storage", Value: "of objects: 3 %"}, {Name: "clock", Value: "set"}}},
				},
				{
					Name: "hsm-b", Driver: "luna", Role: api.RoleStandby, State: api.MemberSyncing, Since: since,
					Sync: &api.Progress{Done: 30, Total: 120, Rate: 4.5, Left: api.Duration(20 * time.Second)}, GaveUp: true, AttemptsTotal: 9,
				},
			},
		}}},
	}
}

// scrape returns the metrics of m by name, as a Prometheus reads them.
func scrape(t *testing.T, m *metrics.Metrics) map[string]*dto.MetricFamily {
	t.Helper()
	text, err := m.Text()
	if err != nil {
		t.Fatal(err)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return families
}

// values are the values of a metric by the values of its labels, joined with commas.
func values(f *dto.MetricFamily) map[string]float64 {
	out := make(map[string]float64)
	for _, m := range f.GetMetric() {
		var labels []string
		for _, l := range m.GetLabel() {
			labels = append(labels, l.GetValue())
		}
		v := cmp.Or(m.GetGauge().GetValue(), m.GetCounter().GetValue(), m.GetHistogram().GetSampleSum())
		out[strings.Join(labels, ",")] = v
	}
	return out
}

func TestMetricsSayWhatStatusSays(t *testing.T) {
	m := metrics.New(example(), "v1.2.3")
	m.Observe("wrap", "ok", 0, nil, 3*time.Millisecond)
	m.Observe("wrap", "ok", 10, map[api.Code]int{api.CodeGroupLost: 2, api.CodeDeadline: 1}, 5*time.Millisecond)
	m.Observe("wrap", "group_lost", 0, nil, time.Microsecond)
	got := scrape(t, m)
	for _, c := range []struct {
		metric, labels string
		want           float64
	}{
		{"kmsd_ready", "", 1},
		{"kmsd_group_state", "default,sole", 1},
		{"kmsd_group_state", "default,normal", 0},
		{"kmsd_group_keys", "default", 12},
		{"kmsd_group_min_copies", "default", 2},
		{"kmsd_group_keys_below_min_copies", "default", 3},
		{"kmsd_group_keys_without_copy", "default", 1},
		{"kmsd_group_keys_wearing_out", "default", 4},
		{"kmsd_member_info", "softhsm,default,hsm-a,active", 1},
		{"kmsd_member_info", "luna,default,hsm-b,standby", 1},
		{"kmsd_member_state", "default,hsm-a,active", 1},
		{"kmsd_member_state", "default,hsm-b,active", 0},
		{"kmsd_member_state", "default,hsm-b,syncing", 1},
		{"kmsd_member_since_timestamp_seconds", "default,hsm-a", 1795230245.25},
		{"kmsd_member_round_trip_timestamp_seconds", "default,hsm-a", 1795230245.25},
		{"kmsd_member_round_trip_timestamp_seconds", "default,hsm-b", 0},
		{"kmsd_member_in_flight", "default,hsm-a", 4},
		{"kmsd_member_commands_total", "default,hsm-a", 1234},
		{"kmsd_member_errors_total", "default,hsm-a", 5},
		{"kmsd_member_command_duration_seconds", "default,hsm-a", 3},
		{"kmsd_member_keys", "default,hsm-a", 11},
		{"kmsd_member_keys_missing", "default,hsm-a", 1},
		{"kmsd_member_keys_foreign", "default,hsm-a", 2},
		{"kmsd_member_keys_quarantined", "default,hsm-a", 3},
		{"kmsd_member_recovery_attempts_total", "default,hsm-b", 9},
		{"kmsd_member_gave_up", "default,hsm-a", 0},
		{"kmsd_member_gave_up", "default,hsm-b", 1},
		{"kmsd_member_warning", "storage,default,hsm-a", 1},
		{"kmsd_member_warning", "clock,default,hsm-a", 0},
		{"kmsd_member_sync_keys", "default,hsm-b", 120},
		{"kmsd_member_sync_keys_done", "default,hsm-b", 30},
		{"kmsd_member_sync_keys_per_second", "default,hsm-b", 4.5},
		{"kmsd_member_sync_left_seconds", "default,hsm-b", 20},
		{"kmsd_job_waiting", "crm", 0},
		{"kmsd_job_waiting", "erp", 1},
		{"kmsd_job_started_timestamp_seconds", "erp", 1795230245.25},
		{"kmsd_job_data_key_versions", "erp", 9},
		{"kmsd_job_data_key_versions_done", "erp", 7},
		{"kmsd_job_data_key_versions_failed", "erp", 2},
		{"kmsd_job_data_key_versions_per_second", "crm", 4.5},
		{"kmsd_job_left_seconds", "crm", 20},
		{"kmsd_requests_total", "wrap,ok", 2},
		{"kmsd_requests_total", "wrap,group_lost", 1},
		{"kmsd_request_items_total", "wrap,ok", 8},
		{"kmsd_request_items_total", "wrap,group_lost", 3},
		{"kmsd_request_items_total", "wrap,deadline", 1},
		{"kmsd_request_duration_seconds", "wrap", 0.008001},
	} {
		if v, ok := values(got[c.metric])[c.labels]; !ok || v != c.want {
			t.Errorf("%s{%s} is %v (%t), want %v", c.metric, c.labels, v, ok, c.want)
		}
	}
	if _, ok := values(got["kmsd_member_sync_keys"])["default,hsm-a"]; ok {
		t.Error("a member that is in step has a sync")
	}
}

func TestBucketsOfALatencyAreCumulative(t *testing.T) {
	h := scrape(t, metrics.New(example(), ""))["kmsd_member_command_duration_seconds"].GetMetric()[0].GetHistogram()
	var got []string
	for _, b := range h.GetBucket() {
		got = append(got, fmt.Sprintf("%g:%d", b.GetUpperBound(), b.GetCumulativeCount()))
	}
	want := []string{
		"0.0001:3", "0.00025:3", "0.0005:3", "0.001:5", "0.0025:5", "0.005:5", "0.01:5", "0.025:5", "0.05:5",
		"0.1:5", "0.25:5", "0.5:5", "1:5", "2.5:5", "5:5", "10:5", "20:6", "+Inf:7",
	}
	if !slices.Equal(got, want) || h.GetSampleCount() != 7 {
		t.Errorf("got %d in %v, want 7 in %v", h.GetSampleCount(), got, want)
	}
}

// Names are a promise to those who have written alerts with them.
func TestNamesAreTheGoldenOnes(t *testing.T) {
	m := metrics.New(example(), "v1.2.3")
	m.Certificate(func() time.Time { return since })
	m.Databases(func() bool { return true })
	m.Observe("wrap", "ok", 1, nil, time.Millisecond)
	var got strings.Builder
	families := scrape(t, m)
	for _, name := range slices.Sorted(maps.Keys(families)) {
		if !strings.HasPrefix(name, "kmsd_") {
			continue // those of the Go runtime and the process are their library's
		}
		f := families[name]
		var labels []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		fmt.Fprintf(&got, "%s %s {%s}\n", name, strings.ToLower(f.GetType().String()), strings.Join(labels, ","))
	}
	const golden = "testdata/names.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("the metrics are\n%s\nwant\n%s", got.String(), want)
	}
}

func TestPrometheusFindsNothingToComplainOf(t *testing.T) {
	m := metrics.New(example(), "v1.2.3")
	m.Observe("wrap", "ok", 1, nil, time.Millisecond)
	text, err := m.Text()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.New(bytes.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestWhoeverAsksAllTheTimeGetsTheLastAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := example()
		m := metrics.New(s, "")
		for range 100 {
			scrape(t, m)
			<-time.After(10 * time.Millisecond)
		}
		if s.asked != 4 {
			t.Errorf("100 scrapes in a second asked for the status %d times, want 4", s.asked)
		}
		s.status.Groups[0].State = api.GroupLost
		<-time.After(250 * time.Millisecond)
		if v := values(scrape(t, m)["kmsd_group_state"]); v["default,lost"] != 1 || v["default,sole"] != 0 {
			t.Errorf("after a loss the states are %v", v)
		}
	})
}

func TestOneFaultyNameHidesNothingElse(t *testing.T) {
	s := example()
	s.status.Groups[0].Members[1].Name = "hsm-\xff"
	got := scrape(t, metrics.New(s, ""))
	if v := values(got["kmsd_member_state"]); v["default,hsm-a,active"] != 1 || len(v) != 7 {
		t.Errorf("the states are %v", v)
	}
}

// Whatever is asked, and how often, the number of series stays that of the members.
func TestSeriesAreThoseOfGroupsAndMembers(t *testing.T) {
	s := example()
	for i := range 30 {
		member := s.status.Groups[0].Members[0]
		member.Name = fmt.Sprintf("hsm-%02d", i)
		s.status.Groups[0].Members = append(s.status.Groups[0].Members, member)
	}
	m := metrics.New(s, "")
	for i := range 10_000 {
		m.Observe("wrap", "ok", 1, nil, time.Duration(i)*time.Microsecond)
	}
	n := 0
	for name, f := range scrape(t, m) {
		if strings.HasPrefix(name, "kmsd_") {
			n += len(f.GetMetric())
		}
	}
	if n > 32*25+40 {
		t.Errorf("32 members have %d series", n)
	}
}

func BenchmarkObserve(b *testing.B) {
	m := metrics.New(example(), "")
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			m.Observe("wrap", "ok", 1, nil, 300*time.Microsecond)
		}
	})
}

func BenchmarkScrape(b *testing.B) {
	s := example()
	for i := range 30 {
		member := s.status.Groups[0].Members[0]
		member.Name = fmt.Sprintf("hsm-%02d", i)
		s.status.Groups[0].Members = append(s.status.Groups[0].Members, member)
	}
	for b.Loop() {
		if _, err := metrics.New(s, "").Text(); err != nil {
			b.Fatal(err)
		}
	}
}
