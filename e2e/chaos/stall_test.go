package chaos_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"runtime/metrics"
	"slices"
	"strconv"
	"time"

	"kmsd/e2e/chaos"
)

const (
	watchEvery = 10 * time.Millisecond
	noticeable = 10 * time.Millisecond
)

// watch takes down when this process was not running: its timers came late, one of its
// threads waited for a CPU, one of its goroutines for a thread, or a CPU for the machine that
// this one is a guest of; perhaps with an answer in its hands.
func (l *load) watch(ctx context.Context) {
	tick := time.NewTimer(watchEvery)
	defer tick.Stop()
	waited := map[string]time.Duration{} // :: thread → in all
	taken := map[string]time.Duration{}  // :: CPU → in all
	var goroutines queue
	for looked := time.Now(); ctx.Err() == nil; {
		due := time.Now().Add(watchEvery)
		tick.Reset(watchEvery)
		<-tick.C
		now := time.Now()
		longest := max(now.Sub(due), threadsWaited(waited), goroutines.waited(), cpusTaken(taken))
		if longest > noticeable {
			// Somebody has gone on since the last look, after that time.
			l.mu.Lock()
			l.stalls = append(l.stalls, chaos.Stall{From: looked.Add(-longest), To: now})
			l.mu.Unlock()
		}
		looked = now
	}
}

// queue is how long goroutines have waited for a thread, as the runtime counts it for one
// in eight of them. The zero value is for the first look.
type queue struct {
	sample [1]metrics.Sample
	before []uint64 // :: bucket → how many have waited so long
}

// waited returns the longest that a goroutine has waited since the last look.
func (q *queue) waited() (longest time.Duration) {
	q.sample[0].Name = "/sched/latencies:seconds"
	metrics.Read(q.sample[:])
	if q.sample[0].Value.Kind() != metrics.KindFloat64Histogram {
		return 0
	}
	h := q.sample[0].Value.Float64Histogram()
	if len(q.before) == len(h.Counts) {
		for i, n := range slices.Backward(h.Counts) {
			if n > q.before[i] {
				longest = time.Duration(h.Buckets[i] * float64(time.Second)) // and a little more
				break
			}
		}
	}
	q.before = append(q.before[:0], h.Counts...)
	return longest
}

// threadsWaited returns the longest that a thread of this process has waited for a CPU
// since the last look, and keeps the times of this one. Only Linux tells; elsewhere it is
// 0.
func threadsWaited(before map[string]time.Duration) (longest time.Duration) {
	files, _ := filepath.Glob("/proc/self/task/*/schedstat")
	for _, path := range files {
		// Nanoseconds on a CPU, nanoseconds of waiting for one, and how often.
		b, err := os.ReadFile(path)
		fields := bytes.Fields(b)
		if err != nil || len(fields) != 3 {
			continue // the thread has ended
		}
		ns, err := strconv.ParseInt(string(fields[1]), 10, 64)
		if err != nil {
			continue
		}
		was, known := before[path]
		before[path] = time.Duration(ns)
		if known {
			longest = max(longest, time.Duration(ns)-was)
		}
	}
	return longest
}

// cpusTaken returns the longest that a CPU of this machine was taken away by the one that
// it is a guest of since the last look, in steps of 10 ms, and keeps the times of this one.
// Only Linux tells; elsewhere it is 0.
func cpusTaken(before map[string]time.Duration) (longest time.Duration) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(b) {
		// cpu0, and hundredths of a second in user, nice, system, idle, iowait, irq,
		// softirq, steal. The line before is the sum of all.
		fields := bytes.Fields(line)
		if len(fields) < 9 || !bytes.HasPrefix(fields[0], []byte("cpu")) || len(fields[0]) == len("cpu") {
			continue
		}
		hundredths, err := strconv.Atoi(string(fields[8]))
		if err != nil {
			continue
		}
		name, all := string(fields[0]), time.Duration(hundredths)*time.Second/100
		was, known := before[name]
		before[name] = all
		if known {
			longest = max(longest, all-was)
		}
	}
	return longest
}
