package audit_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kmsd/cmd/kmsd/internal/audit"
	"kmsd/internal/leaktest"
)

// childEnv makes the test binary a process that writes into the log it names.
const childEnv = "AUDIT_TEST_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		if err := writeForEver(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
	leaktest.Main(m)
}

func mustOpen(t testing.TB, path string) *audit.Log {
	t.Helper()
	l, err := audit.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func mustWrite(t testing.TB, l *audit.Log, r audit.Record) {
	t.Helper()
	if err := l.Write(r); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func mustVerify(t testing.TB, path string) audit.Report {
	t.Helper()
	report, err := audit.Verify(bytes.NewReader(mustRead(t, path)))
	if err != nil {
		t.Fatalf("%v in:\n%s", err, mustRead(t, path))
	}
	return report
}

// newLog writes a log of n records and returns its path.
func newLog(t testing.TB, n int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := mustOpen(t, path)
	for i := range n {
		mustWrite(t, l, audit.Record{Action: "wrap", Key: fmt.Sprintf("key-%d", i+1), Outcome: "ok"})
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLinesAreTheRecords(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := mustOpen(t, path)
	when := time.Date(2026, 1, 2, 3, 4, 5, 6000, time.FixedZone("", 3600))
	mustWrite(t, l, audit.Record{
		Time: when, RequestID: "r-1", Principal: "shop-app", Remote: "10.0.0.1:999", Action: "unwrap", Operation: "none", Group: "default", Key: "shop",
		Member: "hsm-b", Database: "erp", NamedKey: "k/\xff .", Job: "j-1", Version: 3, Items: 4, Failed: 1, AllowDegraded: true, Force: true, Adopt: true, Spec: "driver=softhsm", Outcome: "corrupt", Duration: 1500 * time.Microsecond,
	})
	mustWrite(t, l, audit.Record{
		Time: when, Key: "\"quoted\"\n\x00\xff ü", Remote: strings.Repeat("ü", 300), Spec: strings.Repeat("/", 5000), NamedKey: strings.Repeat("\x00", 255), Action: "read", Outcome: "denied",
	})
	l.Close()

	lines := strings.Split(strings.TrimSuffix(string(mustRead(t, path)), "\n"), "\n")
	const first = `{"seq":1,"time":"2026-01-02T02:04:05.000006Z","request_id":"r-1","principal":"shop-app","remote":"10.0.0.1:999",` +
		`"action":"unwrap","operation":"none","group":"default","key":"shop","database":"erp","named_key":"k%2F%FF%20.","job":"j-1","version":3,"items":4,"failed":1,"member":"hsm-b","allow_degraded":true,"force":true,"adopt":true,"spec":"driver=softhsm",` +
		`"outcome":"corrupt","duration_us":1500,"prev":"0000000000000000000000000000000000000000000000000000000000000000","hash":"`
	if len(lines) != 2 || !strings.HasPrefix(lines[0], first) {
		t.Errorf("lines\n%s\nwant first\n%s", strings.Join(lines, "\n"), first)
	}
	var second struct {
		Key, Remote, Spec string
		NamedKey          string `json:"named_key"`
		Version           *int
	}
	if err := json.Unmarshal([]byte(lines[1]), &second); err != nil {
		t.Fatal(err)
	}
	if second.Key != "\"quoted\"\n\x00\ufffd ü" || len(second.Remote) > 256 || !strings.HasPrefix(second.Remote, "üüü") || !strings.HasSuffix(second.Remote, "ü...") || len(second.Spec) != 1024 || second.NamedKey != strings.Repeat("%00", 255) || second.Version != nil {
		t.Errorf("%+v", second)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", info.Mode(), err)
	}
	report := mustVerify(t, path)
	if report.Records != 2 || report.First != 1 || report.Last != 2 || report.Recoveries != 0 || !report.From.Equal(when) || len(report.Head) != 64 {
		t.Errorf("%+v", report)
	}
}

func TestChainGoesOnAfterARestart(t *testing.T) {
	path := newLog(t, 3)
	for range 3 {
		l := mustOpen(t, path)
		mustWrite(t, l, audit.Record{Action: "wrap"})
		l.Close()
	}
	if report := mustVerify(t, path); report.Records != 6 || report.Last != 6 {
		t.Errorf("%+v", report)
	}
}

func TestCutAtAnyByteTheLogGoesOnAndSaysSo(t *testing.T) {
	good := mustRead(t, newLog(t, 3))
	lines := bytes.SplitAfter(good, []byte("\n"))
	whole := len(lines[0]) + len(lines[1])
	for n := 1; n <= len(good); n++ {
		path := filepath.Join(t.TempDir(), "audit.jsonl")
		write(t, path, good[:n])
		l := mustOpen(t, path)
		mustWrite(t, l, audit.Record{Action: "wrap", Key: "after"})
		l.Close()
		report := mustVerify(t, path)
		if !bytes.HasPrefix(mustRead(t, path), good[:n]) {
			t.Fatalf("cut at byte %d: something was taken away", n)
		}
		if n > whole+1 && n < len(good)-1 && (report.Recoveries != 1 || report.CutBytes != int64(n-whole) || report.Records != 4) {
			t.Errorf("cut at byte %d: %+v", n, report)
		}
	}
}

func TestCutWhileGoingOnAfterACut(t *testing.T) {
	good := mustRead(t, newLog(t, 2))
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	write(t, path, good[:len(good)-20])
	mustOpen(t, path).Close()
	after := mustRead(t, path)
	for n := len(good) - 20; n <= len(after); n++ {
		write(t, path, after[:n])
		l := mustOpen(t, path)
		mustWrite(t, l, audit.Record{Action: "wrap"})
		l.Close()
		if report := mustVerify(t, path); report.Recoveries != 1 {
			t.Errorf("cut again at byte %d: %+v", n, report)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	cases := []struct {
		name string
		make func(t *testing.T, path string)
		says string
	}{
		{"a log that others may write", func(t *testing.T, path string) { os.Chmod(path, 0o620) }, "its mode is 0620"},
		{"a folder", func(t *testing.T, path string) { os.Remove(path); os.Mkdir(path, 0o700) }, "directory"},
		{"a pipe", func(t *testing.T, path string) { os.Remove(path); syscall.Mkfifo(path, 0o600) }, "not a regular file"},
		{"something else", func(t *testing.T, path string) { write(t, path, []byte("root:x:0:0\n")) }, "not an audit log of kmsd"},
		{"something else without lines", func(t *testing.T, path string) { write(t, path, make([]byte, 5000)) }, "not an audit log of kmsd"},
		{"a log whose last line was altered", func(t *testing.T, path string) {
			write(t, path, bytes.Replace(mustRead(t, path), []byte("key-3"), []byte("key-4"), 1))
		}, "one of its last lines was altered"},
		{"a log whose last line was altered and lost its end", func(t *testing.T, path string) {
			write(t, path, bytes.TrimSpace(bytes.Replace(mustRead(t, path), []byte("key-3"), []byte("key-4"), 1)))
		}, "one of its last lines was altered"},
		{"a log with megabytes behind it", func(t *testing.T, path string) {
			write(t, path, append(mustRead(t, path), make([]byte, 3<<20)...))
		}, "its end is damaged"},
		{"a log in a folder that is missing", func(t *testing.T, path string) { os.RemoveAll(filepath.Dir(path)) }, "no such file"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			path := newLog(t, 3)
			c.make(t, path)
			_, err := audit.Open(path)
			if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), path) {
				t.Errorf("error %v, want the path and %q", err, c.says)
			}
		})
	}
	path := newLog(t, 1)
	mustOpen(t, path)
	if _, err := audit.Open(path); !errors.Is(err, audit.ErrInUse) {
		t.Errorf("opened twice: %v, want ErrInUse", err)
	}
}

func TestReopenGoesOnInTheNewFile(t *testing.T) {
	path := newLog(t, 3)
	l := mustOpen(t, path)
	mustWrite(t, l, audit.Record{Action: "wrap"})
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, l, audit.Record{Action: "wrap"}) // still the same file
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, l, audit.Record{Action: "wrap"}) // follows the name
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, l, audit.Record{Action: "wrap"})

	old, current := mustVerify(t, path+".1"), mustVerify(t, path)
	if old.Records != 6 || current.Records != 1 || current.First != 7 || current.Prev != old.Head {
		t.Errorf("old %+v, new %+v", old, current)
	}
	l.Close()
	l = mustOpen(t, path)
	mustWrite(t, l, audit.Record{Action: "wrap"})
	if report := mustVerify(t, path); report.Last != 8 {
		t.Errorf("after a restart %+v", report)
	}

	os.Rename(path, path+".2")
	write(t, path, mustRead(t, path+".1"))
	if err := l.Reopen(); err == nil || !strings.Contains(err.Error(), "there are records in it already") {
		t.Errorf("a new file with records: %v", err)
	}
	mustWrite(t, l, audit.Record{Action: "wrap"})
	if report := mustVerify(t, path+".2"); report.Last != 9 {
		t.Errorf("the log does not go on in the old file: %+v", report)
	}
}

func TestClosedLogTakesNothing(t *testing.T) {
	l := mustOpen(t, newLog(t, 1))
	if err := errors.Join(l.Close(), l.Close(), l.Sync()); err != nil {
		t.Error(err)
	}
	if err := l.Write(audit.Record{}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Write: %v", err)
	}
	if err := l.Reopen(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Reopen: %v", err)
	}
}

func TestManyWritersAndRotationsMakeOneChain(t *testing.T) {
	path := newLog(t, 0)
	l := mustOpen(t, path)
	const writers, each, rotations = 16, 100, 5
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				if err := l.Write(audit.Record{Action: "wrap"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range rotations {
		if err := errors.Join(os.Rename(path, fmt.Sprintf("%s.%d", path, i)), l.Reopen(), l.Sync()); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	total, head := 0, strings.Repeat("0", 64)
	for i := range rotations + 1 {
		p := fmt.Sprintf("%s.%d", path, i)
		if i == rotations {
			p = path
		}
		if report := mustVerify(t, p); report.Records > 0 {
			if report.Prev != head {
				t.Errorf("file %d does not follow the one before it", i)
			}
			total, head = total+report.Records, report.Head
		}
	}
	if total != writers*each {
		t.Errorf("%d records, want %d", total, writers*each)
	}
}

// TestFullDisk limits the size of files in this process, which looks like a full
// disk: a part of a line is written, then nothing. It must not run in parallel.
func TestFullDisk(t *testing.T) {
	path := newLog(t, 1)
	l := mustOpen(t, path)
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	full := old
	full.Cur = uint64(len(mustRead(t, path)) + 100)
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &full); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := l.Write(audit.Record{Action: "wrap"}); !errors.Is(err, syscall.EFBIG) || !strings.Contains(err.Error(), path) {
			t.Errorf("on a full disk: %v, want EFBIG and the path", err)
		}
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, l, audit.Record{Action: "wrap"})
	l.Close()
	if report := mustVerify(t, path); report.Recoveries != 1 || report.CutBytes < 100 || report.Records != 3 {
		t.Errorf("%+v", report)
	}
}

func TestAcknowledgedRecordsSurviveSIGKILL(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	acknowledged := make(map[string]bool)
	for range 10 {
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), childEnv+"="+path)
		child.Stderr = os.Stderr
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		after := 1 + rand.IntN(500)
		acks := bufio.NewScanner(out)
		for n := 0; acks.Scan(); n++ {
			acknowledged[acks.Text()] = true
			if n == after {
				_ = child.Process.Kill()
			}
		}
		_ = child.Wait()
	}
	mustOpen(t, path).Close()
	if report := mustVerify(t, path); report.Records < len(acknowledged) {
		t.Errorf("%d records, %d were acknowledged", report.Records, len(acknowledged))
	}
	log := string(mustRead(t, path))
	for id := range acknowledged {
		if !strings.Contains(log, `"request_id":"`+id+`"`) {
			t.Fatalf("acknowledged record %s is missing", id)
		}
	}
}

// writeForEver is the child: it prints the ID of each record that is written.
func writeForEver(path string) error {
	l, err := audit.Open(path)
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		id := fmt.Sprintf("%d-%d", os.Getpid(), i)
		if err := l.Write(audit.Record{RequestID: id, Action: "wrap", Outcome: "ok"}); err != nil {
			return err
		}
		fmt.Println(id)
	}
}

func BenchmarkWrite(b *testing.B) {
	for _, writers := range []int{1, 64} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			l := mustOpen(b, filepath.Join(b.TempDir(), "audit.jsonl"))
			r := audit.Record{
				RequestID: "01J8ZQ3V6E8R2S4T5W7X9Y0ABC", Principal: "shop-app", Remote: "10.0.0.1:54321", Action: "unwrap",
				Key: "shop", Version: 3, Member: "hsm-b", Outcome: "ok", Duration: 180 * time.Microsecond,
			}
			b.SetParallelism(writers)
			b.ReportAllocs()
			start := time.Now()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := l.Write(r); err != nil {
						b.Error(err)
					}
				}
			})
			b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "records/s")
		})
	}
}

func TestALogOfAnotherUserIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, 65534, 65534); (err == nil) != (os.Geteuid() == 0) {
		t.Fatal(err) // only root can give a file away
	}
	if os.Geteuid() != 0 {
		return
	}
	if _, err := audit.Open(path); err == nil || !strings.Contains(err.Error(), "belongs to another user") {
		t.Errorf("got %v", err)
	}
}
