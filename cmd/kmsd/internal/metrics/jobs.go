package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kmsd/kms/api"
)

// jobs collects how far the jobs are that have not ended, at the moment of a scrape.
type jobs struct{ source Source }

var (
	jobWaiting = ofJob("waiting", "1 while the job waits for an HSM or a disk, else 0; it goes on by itself.")
	jobSince   = ofJob("started_timestamp_seconds", "When the job began, Unix time.")
	jobTotal   = ofJob("data_key_versions", "Versions of data keys that the job is about.")
	jobDone    = ofJob("data_key_versions_done", "Of them, those that the job has looked at.")
	jobFailed  = ofJob("data_key_versions_failed", "Of those, the ones that could not be wrapped anew and stay as they were.")
	jobRate    = ofJob("data_key_versions_per_second", "How fast the job is.")
	jobLeft    = ofJob("left_seconds", "How long the job still takes at this rate; 0: not known yet.")
)

func ofJob(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("kmsd_job_"+name, help, []string{"database"}, nil)
}

// Describe implements prometheus.Collector.
func (jobs) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{jobWaiting, jobSince, jobTotal, jobDone, jobFailed, jobRate, jobLeft} {
		to <- d
	}
}

// Collect implements prometheus.Collector.
func (j jobs) Collect(to chan<- prometheus.Metric) {
	for _, job := range j.source.Jobs() {
		p := job.Progress
		gauge(to, jobWaiting, truth(job.State == api.JobWaiting), job.Database)
		gauge(to, jobSince, unix(job.Started), job.Database)
		gauge(to, jobTotal, float64(p.Total), job.Database)
		gauge(to, jobDone, float64(p.Done), job.Database)
		gauge(to, jobFailed, float64(job.Failed), job.Database)
		gauge(to, jobRate, p.Rate, job.Database)
		gauge(to, jobLeft, time.Duration(p.Left).Seconds(), job.Database)
	}
}
