package supervisor_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/internal/group"
	"kmsd/kms/internal/supervisor"
	"kmsd/pluginproto"
)

var _ group.Conn = (*supervisor.Process)(nil)

// program returns the path of one of the programs of TestMain.
func program(t *testing.T, name string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.Symlink(self, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// shortTempDir gives the test a temporary directory of its own whose name leaves
// room for a socket.
func shortTempDir(t *testing.T) {
	t.Helper()
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("TMPDIR", dir)
}

// start starts a driver and opens its token.
func start(t *testing.T) *supervisor.Process {
	t.Helper()
	p, err := supervisor.Start(t.Context(), supervisor.Spec{Name: "a", Path: program(t, "driver"), Insecure: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		<-p.Done()
	})
	if _, err := p.Open(t.Context(), pluginproto.OpenRequest{PIN: []byte("1234"), Domain: make([]byte, 32)}); err != nil {
		t.Fatal(err)
	}
	return p
}

func wantGone(t *testing.T, p *supervisor.Process) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(patience):
		t.Fatalf("the process is still there after %v", patience)
	}
	if err := syscall.Kill(p.PID(), 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d is still known to the kernel: %v", p.PID(), err)
	}
}

// freeze stops a process and returns when every thread of it stands still, which is not
// yet so when the signal is sent.
func freeze(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for began := time.Now(); !standsStill(t, pid); <-look.C {
		if time.Since(began) > patience {
			t.Fatalf("process %d does not stand still after %v", pid, patience)
		}
	}
}

func standsStill(t *testing.T, pid int) bool {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(threads) == 0 {
		t.Fatalf("process %d has %d threads: %v", pid, len(threads), err)
	}
	for _, path := range threads {
		stat, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		// The state follows the name, which is in brackets and may have any character.
		if after := stat[bytes.LastIndexByte(stat, ')')+1:]; !bytes.HasPrefix(after, []byte(" T")) {
			return false
		}
	}
	return true
}

func wantNoDirectories(t *testing.T) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(os.TempDir(), "kmsd-driver-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestADriverServesUntilItIsClosed(t *testing.T) {
	shortTempDir(t)
	p := start(t)
	res, err := p.Do(t.Context(), pluginproto.Command{Op: pluginproto.OpRandom, Length: 16})
	if err != nil || len(res.Output) != 16 {
		t.Fatalf("asking for random bytes: %d bytes, %v", len(res.Output), err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	wantGone(t, p)
	wantNoDirectories(t)
}

func TestKillEndsAFrozenDriverWithAllThatWaitsForIt(t *testing.T) {
	shortTempDir(t)
	p := start(t)
	freeze(t, p.PID())
	failed := make(chan error)
	go func() {
		_, err := p.Do(context.Background(), pluginproto.Command{Op: pluginproto.OpProbe})
		failed <- err
	}()
	select {
	case err := <-failed:
		t.Fatalf("a frozen driver answered: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	p.Kill()
	p.Kill()
	if err := <-failed; pluginproto.ClassOf(err) != pluginproto.ClassMember {
		t.Errorf("the command that waited got %v", err)
	}
	wantGone(t, p)
	wantNoDirectories(t)
}

func TestTheEndOfADriverIsNoticed(t *testing.T) {
	p := start(t)
	if err := syscall.Kill(p.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	wantGone(t, p) // though nobody has asked it anything
	if _, err := p.Do(t.Context(), pluginproto.Command{Op: pluginproto.OpProbe}); pluginproto.ClassOf(err) != pluginproto.ClassMember {
		t.Errorf("a command after the end got %v", err)
	}
}

func TestTheProgramHasToBeTheOneThatWasAskedFor(t *testing.T) {
	path := program(t, "driver")
	bytes, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	right := sha256.Sum256(bytes)
	wrong := sha256.Sum256(nil)
	for range 2 { // a checksum is good for more than one start
		p, err := supervisor.Start(t.Context(), supervisor.Spec{Name: "a", Path: path, SHA256: right[:]})
		if err != nil {
			t.Fatal(err)
		}
		p.Kill()
		wantGone(t, p)
	}
	for _, c := range []struct {
		name string
		spec supervisor.Spec
		want string
	}{
		{"another sum is refused, and both are named",
			supervisor.Spec{Name: "a", Path: path, SHA256: wrong[:]},
			fmt.Sprintf("starting driver driver of member a: %s has the SHA-256 %x, want %x", path, right, wrong)},
		{"a wrong sum is refused although the mode is insecure",
			supervisor.Spec{Name: "a", Path: path, SHA256: wrong[:], Insecure: true}, "has the SHA-256"},
		{"no sum is refused", supervisor.Spec{Name: "a", Path: path}, "the SHA-256 of " + path + " is not given"},
		{"a missing program is named", supervisor.Spec{Name: "a", Path: path + "-not", Insecure: true}, "driver-not: no such file or directory"},
		{"a missing program is named when it has a sum", supervisor.Spec{Name: "a", Path: path + "-not", SHA256: right[:]}, "driver-not: no such file or directory"},
		{"a directory is no program", supervisor.Spec{Name: "a", Path: filepath.Dir(path), Insecure: true}, "permission denied"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := supervisor.Start(t.Context(), c.spec)
			if err == nil {
				p.Kill()
			}
			wantFailure(t, err, c.want, true)
		})
	}
}

func wantFailure(t *testing.T, err error, text string, permanent bool) {
	t.Helper()
	var e *pluginproto.Error
	if !errors.As(err, &e) || e.Class != pluginproto.ClassMember || e.Permanent != permanent {
		t.Fatalf("got %#v, want a member's failure, permanent: %v", err, permanent)
	}
	if !strings.Contains(err.Error(), text) {
		t.Errorf("got %q, want it to say %q", err, text)
	}
	if strings.ContainsAny(err.Error(), "\n\x1b") {
		t.Errorf("%q has control characters", err)
	}
}

func TestAProgramThatDoesNotShakeHands(t *testing.T) {
	shortTempDir(t)
	for _, c := range []struct{ name, program, want string }{
		{"a crash at the start says how it ended", "crash", "exit status 7"},
		{"garbage is repeated without its control characters", "garbage", "Hello, I am [31m no driver."},
		{"another protocol version is named", "old-version", "99"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := program(t, c.program)
			_, err := supervisor.Start(t.Context(), supervisor.Spec{Name: "a", Path: path, Insecure: true})
			wantFailure(t, err, c.want, false)
			wantFailure(t, err, "starting driver "+c.program+" of member a: ", false)
		})
	}
	wantNoDirectories(t)
}

func TestATemporaryDirectoryThatIsTooLongForASocketIsNamed(t *testing.T) {
	path := program(t, "driver")
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 20))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", dir)
	_, err := supervisor.Start(t.Context(), supervisor.Spec{Name: "a", Path: path, Insecure: true})
	wantFailure(t, err, "set TMPDIR to a shorter one", false)
	wantNoDirectories(t)
}

func TestAStartEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	path := program(t, "slow")
	began := time.Now()
	_, err := supervisor.Start(ctx, supervisor.Spec{Name: "a", Path: path, Insecure: true})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if d := time.Since(began); d > startTimeout/2 { // the handshake had not been given up
		t.Errorf("Start took %v", d)
	}
	if _, err := supervisor.Start(ctx, supervisor.Spec{Name: "a", Path: path, Insecure: true}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a context that has ended: %v", err)
	}
}

// journal is a log that many may write to.
type journal struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.String()
}

func TestADriverGetsNothingOfTheDaemonsButWhatItNeeds(t *testing.T) {
	t.Setenv("VAULT_TOKEN", "s.secret")
	var log journal
	_, err := supervisor.Start(t.Context(), supervisor.Spec{
		Name: "a", Path: program(t, "environment"), Insecure: true,
		Logger: hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Debug}),
	})
	wantFailure(t, err, "exit status 1", false)
	said := log.String()
	allowed := []string{"KMSD_DRIVER=", "KMSD_PARENT_PID=" + strconv.Itoa(os.Getpid()), "PLUGIN_"}
	seen := 0
	for line := range strings.Lines(said) {
		_, env, found := strings.Cut(line, "env: ")
		if !found {
			continue
		}
		seen++
		ok := false
		for _, prefix := range allowed {
			ok = ok || strings.HasPrefix(env, prefix)
		}
		if !ok {
			t.Errorf("the driver sees %q", env)
		}
	}
	if seen == 0 || !strings.Contains(said, "stdin: 0 EOF args: 1") || strings.Contains(said, "s.secret") {
		t.Errorf("the driver said\n%s", said)
	}
}

func TestWhatADriverPrintsReachesTheLogAsText(t *testing.T) {
	var log journal
	_, err := supervisor.Start(t.Context(), supervisor.Spec{
		Name: "a", Path: program(t, "crash"), Insecure: true,
		Logger: hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Debug}),
	})
	wantFailure(t, err, "exit status 7", false)
	if said := log.String(); !strings.Contains(said, "cannot find?[2J my library") || strings.Contains(said, "\x1b") {
		t.Errorf("the log says %q", said)
	}
}

// lateJournal is a log that takes its time for the first line of a driver.
type lateJournal struct {
	journal
	once sync.Once
}

func (j *lateJournal) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("xxxx")) {
		j.once.Do(func() { <-time.After(1500 * time.Millisecond) })
	}
	return j.journal.Write(p)
}

func TestTheLastWordsOfADriverAreReadHoweverLateThatIs(t *testing.T) {
	var log lateJournal
	_, err := supervisor.Start(t.Context(), supervisor.Spec{
		Name: "a", Path: program(t, "farewell"), Insecure: true,
		Logger: hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Debug}),
	})
	wantFailure(t, err, "exit status 7", false)
	if said := log.String(); !strings.Contains(said, "my last words") {
		t.Errorf("the last that the log says is %q", said[max(0, len(said)-300):])
	}
}

func TestADriverEndsWithADaemonThatIsKilled(t *testing.T) {
	for _, c := range []struct {
		name   string
		frozen bool
	}{{"a driver that runs", false}, {"a driver that is stopped", true}} {
		t.Run(c.name, func(t *testing.T) {
			shortTempDir(t)
			daemon := exec.CommandContext(t.Context(), program(t, "parent"))
			daemon.Stdin = strings.NewReader(program(t, "driver") + "\n")
			out, err := daemon.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := daemon.Start(); err != nil {
				t.Fatal(err)
			}
			line, err := bufio.NewReader(out).ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			pid, err := strconv.Atoi(strings.TrimSpace(line))
			if err != nil {
				t.Fatal(line)
			}
			fd := openProcess(t, pid)
			if c.frozen {
				if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			}
			if err := daemon.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, out)
			daemon.Wait() //nolint:errcheck // it was killed
			wantEnded(t, fd, patience)
			wantNoDirectories(t)
		})
	}
}
