package chaos_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"kmsd/e2e/chaos"
	"kmsd/internal/devserver"
)

// report is what a run shows beside its breaches: nothing in it makes a run fail.
type report struct {
	mu       sync.Mutex // guards the rest
	kinds    map[chaos.Kind]*tally
	open     int // faults that are not healed
	together int // faults that began while another one was open
	resident []int
}

// tally is what there is to tell of the faults of one kind.
type tally struct {
	times  []time.Duration // until what was hurt was whole again
	failed int             // faults in which a member was failed
}

// begin counts a fault as open.
func (r *report) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.open++; r.open > 1 {
		r.together++
	}
}

// healed takes down how long a fault took, and whether its members were failed.
func (r *report) healed(kind chaos.Kind, took time.Duration, failed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open--
	if r.kinds == nil {
		r.kinds = map[chaos.Kind]*tally{}
	}
	t := r.kinds[kind]
	if t == nil {
		t = new(tally)
		r.kinds[kind] = t
	}
	t.times = append(t.times, took)
	if failed {
		t.failed++
	}
}

// String is a table, a line for each kind.
func (r *report) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "kind\tfaults\tmedian until whole\tlongest\twith a failed member")
	for _, kind := range slices.Sorted(maps.Keys(r.kinds)) {
		t := r.kinds[kind]
		slices.Sort(t.times)
		fmt.Fprintf(w, "%s\t%d\t%v\t%v\t%d\n", kind, len(t.times), t.times[len(t.times)/2].Round(time.Millisecond),
			t.times[len(t.times)-1].Round(time.Millisecond), t.failed)
	}
	w.Flush()
	fmt.Fprintf(&b, "%d began while another one was open; kmsd was resident with %s MiB", r.together, mebibytes(r.resident))
	return b.String()
}

// weigh takes down how much memory a kmsd holds.
func (r *report) weigh(pid int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	fields := bytes.Fields(b)
	if err != nil || len(fields) < 2 {
		return // not on Linux, or it has ended
	}
	pages, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.resident = append(r.resident, pages*os.Getpagesize())
}

// mebibytes shows where a series in bytes began, its median, its highest and its last.
func mebibytes(series []int) string {
	if len(series) == 0 {
		return "an unknown number of"
	}
	sorted := slices.Sorted(slices.Values(series))
	return fmt.Sprintf("%d at first, %d mostly, %d at most, %d at last", series[0]>>20, sorted[len(sorted)/2]>>20,
		sorted[len(sorted)-1]>>20, series[len(series)-1]>>20)
}

// failures counts what kmsd has said at the level of errors, by its message and what
// caused it.
func failures(t *testing.T, path string) map[string]int {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Error(err)
		return nil
	}
	defer f.Close()
	count := map[string]int{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line struct {
			Level   string `json:"@level"`
			Message string `json:"@message"`
			Error   string `json:"error"`
			CKR     string `json:"ckr"`
		}
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Level == "error" {
			count[strings.TrimSpace(line.Message+" "+line.Error+line.CKR)]++
		}
	}
	return count
}

// noneIsLeft checks that every process of this site's programs has ended.
func noneIsLeft(t *testing.T, within time.Duration) {
	t.Helper()
	ctx, cancel := timeout(t, within)
	defer cancel()
	if err := devserver.Poll(ctx, func() error {
		if left := processes(); len(left) > 0 {
			return fmt.Errorf("left over: %q", left)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// processes are those that run a program of bin.
func processes() (found []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range files {
		line, err := os.ReadFile(path)
		if err == nil && bytes.HasPrefix(line, []byte(bin+"/")) {
			found = append(found, filepath.Base(filepath.Dir(path))+" "+strings.TrimRight(string(bytes.ReplaceAll(line, []byte{0}, []byte{' '})), " "))
		}
	}
	return found
}
