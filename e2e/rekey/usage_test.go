package rekey_test

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// usage is what kmsd and its drivers have used while a job ran.
type usage struct {
	most   int           // bytes of anonymous memory of kmsd, at the most
	worked time.Duration // of processors, by kmsd and its drivers
	looked time.Time
}

func (u *usage) String() string {
	return fmt.Sprintf("kmsd had at most %d MiB of its own, and each version took %v of a processor", u.most>>20,
		(u.worked / time.Duration(total())).Round(100*time.Nanosecond))
}

// look looks at the memory of a process now and then.
func (u *usage) look(pid int) {
	if time.Since(u.looked) < 100*time.Millisecond {
		return
	}
	u.looked = time.Now()
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kb, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
			u.most = max(u.most, kb<<10)
		}
	}
}

// cpu is how much of a processor a process and its children have used.
func (u *usage) cpu(pid int) time.Duration {
	ticks := 0
	for _, p := range append([]int{pid}, childrenOf(pid)...) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
		fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(fields) > 13 {
			user, _ := strconv.Atoi(fields[11]) // proc(5): utime and stime are fields 14 and 15
			system, _ := strconv.Atoi(fields[12])
			ticks += user + system
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100
}

func childrenOf(pid int) (all []int) {
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, task := range tasks {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, task.Name()))
		for _, s := range strings.Fields(string(b)) {
			if child, err := strconv.Atoi(s); err == nil {
				all = append(all, child)
			}
		}
	}
	return all
}
