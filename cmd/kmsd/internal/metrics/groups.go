package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kmsd/kms/api"
)

// groups collects what status says of groups and members, at the moment of a scrape.
type groups struct{ source Source }

// The states that a group and a member can have: each is a series of its own that is 1 or 0.
var (
	groupStates = []api.GroupState{ // never written to
		api.GroupNormal, api.GroupDegraded, api.GroupSole, api.GroupStandbyServing, api.GroupLost,
	}
	memberStates = []api.MemberState{ // never written to
		api.MemberActive, api.MemberStandby, api.MemberProbing, api.MemberSyncing,
		api.MemberDraining, api.MemberDown, api.MemberFailed,
	}
)

var (
	ready = prometheus.NewDesc("kmsd_ready", "1 when a wrap and unwrap succeeded on some member in the last few seconds.", nil, nil)

	groupState     = ofGroup("state", "1 for the state that the group is in, 0 for the others.", "state")
	groupKeys      = ofGroup("keys", "Living key versions in the catalog.")
	groupMinCopies = ofGroup("min_copies", "How many members have to hold a new key version.")
	groupBelow     = ofGroup("keys_below_min_copies", "Living key versions that fewer members are known to hold than min_copies of their key says.")
	groupWithout   = ofGroup("keys_without_copy", "Living key versions that no member is known to hold.")
	groupWearing   = ofGroup("keys_wearing_out", "Keys whose newest version has wrapped half as often as it may, or more.")

	memberInfo        = ofMember("info", "Always 1; the labels say what the member is.", "driver", "role")
	memberState       = ofMember("state", "1 for the state that the member is in, 0 for the others.", "state")
	memberSince       = ofMember("since_timestamp_seconds", "When the member's state last changed, Unix time.")
	memberRoundTrip   = ofMember("round_trip_timestamp_seconds", "When a wrap and unwrap last succeeded on the member, Unix time; 0: never yet.")
	memberInFlight    = ofMember("in_flight", "Commands that the member has been given and has not answered.")
	memberCommands    = ofMember("commands_total", "Commands that the member has been given.")
	memberErrors      = ofMember("errors_total", "Commands and key operations that the member has failed, a key that it lacks included.")
	memberDuration    = ofMember("command_duration_seconds", "From giving the member a command to its answer.")
	memberKeys        = ofMember("keys", "Key versions that are known to be on the member.")
	memberMissing     = ofMember("keys_missing", "Key versions that should be on the member and are not.")
	memberForeign     = ofMember("keys_foreign", "Objects on the member that the catalog does not know.")
	memberQuarantined = ofMember("keys_quarantined", "Copies on the member with another value than the catalog says; they are never used and never overwritten.")
	memberAttempts    = ofMember("recovery_attempts_total", "Attempts to bring the member back.")
	memberGaveUp      = ofMember("gave_up", "1 when recovery has used up its retries.")
	memberWarning     = ofMember("warning", "1 when a fact of the member's token is a warning, 0 when it is none; kmsd status says what it is.", "fact")
	memberSyncKeys    = ofMember("sync_keys", "Key versions that the present sync is about; absent when there is none.")
	memberSyncDone    = ofMember("sync_keys_done", "Key versions that the present sync has done.")
	memberSyncRate    = ofMember("sync_keys_per_second", "How fast the present sync is.")
	memberSyncLeft    = ofMember("sync_left_seconds", "How long the present sync still takes at this rate; 0: not known yet.")
)

func ofGroup(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("kmsd_group_"+name, help, append([]string{"group"}, labels...), nil)
}

func ofMember(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("kmsd_member_"+name, help, append([]string{"group", "member"}, labels...), nil)
}

// Describe implements prometheus.Collector.
func (groups) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		ready, groupState, groupKeys, groupMinCopies, groupBelow, groupWithout, groupWearing,
		memberInfo, memberState, memberSince, memberRoundTrip,
		memberInFlight, memberCommands, memberErrors, memberDuration,
		memberKeys, memberMissing, memberForeign, memberQuarantined,
		memberAttempts, memberGaveUp, memberWarning,
		memberSyncKeys, memberSyncDone, memberSyncRate, memberSyncLeft,
	} {
		to <- d
	}
}

// Collect implements prometheus.Collector.
func (g groups) Collect(to chan<- prometheus.Metric) {
	r := g.source.Ready()
	gauge(to, ready, truth(r.Ready))
	trips := make(map[[2]string]time.Time, len(r.Members)) // :: group, member → its last round trip
	for _, m := range r.Members {
		trips[[2]string{m.Group, m.Member}] = m.Last
	}
	for _, group := range g.source.Status().Groups {
		for _, s := range groupStates {
			gauge(to, groupState, truth(s == group.State), group.Name, string(s))
		}
		gauge(to, groupKeys, float64(group.Keys), group.Name)
		gauge(to, groupMinCopies, float64(group.MinCopies), group.Name)
		gauge(to, groupBelow, float64(group.BelowMinCopies), group.Name)
		gauge(to, groupWithout, float64(group.WithoutCopy), group.Name)
		gauge(to, groupWearing, float64(group.WearingOut), group.Name)
		for _, m := range group.Members {
			collectMember(to, group.Name, m)
			gauge(to, memberRoundTrip, unix(trips[[2]string{group.Name, m.Name}]), group.Name, m.Name)
		}
	}
}

func collectMember(to chan<- prometheus.Metric, group string, m api.Member) {
	gauge(to, memberInfo, 1, group, m.Name, m.Driver, m.Role)
	for _, s := range memberStates {
		gauge(to, memberState, truth(s == m.State), group, m.Name, string(s))
	}
	gauge(to, memberSince, unix(m.Since), group, m.Name)
	gauge(to, memberInFlight, float64(m.InFlight), group, m.Name)
	counter(to, memberCommands, m.Commands, group, m.Name)
	counter(to, memberErrors, m.Errors, group, m.Name)
	histogram(to, memberDuration, m.Latency, group, m.Name)
	gauge(to, memberKeys, float64(m.Keys), group, m.Name)
	gauge(to, memberMissing, float64(m.Missing), group, m.Name)
	gauge(to, memberForeign, float64(m.Foreign), group, m.Name)
	gauge(to, memberQuarantined, float64(m.Quarantined), group, m.Name)
	counter(to, memberAttempts, m.AttemptsTotal, group, m.Name)
	gauge(to, memberGaveUp, truth(m.GaveUp), group, m.Name)
	for fact, warns := range warnings(m.Token.Facts) {
		gauge(to, memberWarning, truth(warns), group, m.Name, fact)
	}
	if p := m.Sync; p != nil {
		gauge(to, memberSyncKeys, float64(p.Total), group, m.Name)
		gauge(to, memberSyncDone, float64(p.Done), group, m.Name)
		gauge(to, memberSyncRate, p.Rate, group, m.Name)
		gauge(to, memberSyncLeft, time.Duration(p.Left).Seconds(), group, m.Name)
	}
}

// warnings says of each fact by its name whether it is a warning, or one of several of that
// name is: a series may come once only.
func warnings(facts []api.Fact) map[string]bool {
	warns := make(map[string]bool, len(facts))
	for _, f := range facts {
		warns[f.Name] = warns[f.Name] || f.Warning
	}
	return warns
}

func gauge(to chan<- prometheus.Metric, d *prometheus.Desc, value float64, labels ...string) {
	m, err := prometheus.NewConstMetric(d, prometheus.GaugeValue, value, labels...)
	send(to, d, m, err)
}

func counter(to chan<- prometheus.Metric, d *prometheus.Desc, value uint64, labels ...string) {
	m, err := prometheus.NewConstMetric(d, prometheus.CounterValue, float64(value), labels...)
	send(to, d, m, err)
}

func histogram(to chan<- prometheus.Metric, d *prometheus.Desc, h api.Histogram, labels ...string) {
	upTo := make(map[float64]uint64, len(h.Buckets)) // :: bound → how many took that or less
	var sum uint64
	for i, n := range h.Buckets {
		sum += n
		upTo[api.LatencyBounds[i].Seconds()] = sum
	}
	m, err := prometheus.NewConstHistogram(d, h.Count, h.Sum.Seconds(), upTo, labels...)
	send(to, d, m, err)
}

// send sends a metric, or in its place what is wrong with it: a name that is no text
// must not end the daemon, and not hide the other metrics.
func send(to chan<- prometheus.Metric, d *prometheus.Desc, m prometheus.Metric, err error) {
	if err != nil {
		m = prometheus.NewInvalidMetric(d, err)
	}
	to <- m
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// unix is a time in seconds; 0 for none.
func unix(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}
