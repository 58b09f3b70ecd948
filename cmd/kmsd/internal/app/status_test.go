package app_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kmsd/cmd/kmsd/internal/app"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

// memberIs is a Memory with one member, which is as given.
type memberIs struct {
	apitest.Memory
	member api.Member
}

func (m *memberIs) Status() api.Status {
	return api.Status{Groups: []api.Group{{Name: "default", State: api.GroupSole, Members: []api.Member{m.member}}}}
}

// jobsAre is a Memory whose jobs are as given.
type jobsAre struct {
	apitest.Memory
	jobs []api.Job
}

func (m *jobsAre) Status() api.Status {
	st := m.Memory.Status()
	st.Jobs = m.jobs
	return st
}

func TestStatusTellsOfJobs(t *testing.T) {
	m := &jobsAre{jobs: []api.Job{
		{Database: "a", State: api.JobRunning, Progress: api.Progress{Done: 3120, Total: 10000, Rate: 850.2, Left: api.Duration(8100 * time.Millisecond)}},
		{Database: "b", State: api.JobWaiting, Reason: "no member of group default serves", Progress: api.Progress{Done: 1, Total: 2}},
		{Database: "c", State: api.JobFailed, Reason: "version 2 of key c is disabled"},
		{Database: "d", State: api.JobDone, Failed: 2, Progress: api.Progress{Done: 9, Total: 9}},
		{Database: "e", State: api.JobRunning, Failed: 1, Progress: api.Progress{Done: 9, Total: 10}},
	}}
	want := []string{
		"rekey of a: 3,120 of 10,000, 850/s, 8 s left",
		"rekey of b: 1 of 2, waiting: no member of group default serves",
		"rekey of c: has failed: version 2 of key c is disabled; kmsd database show c",
		"rekey of d: 2 data key versions could not be wrapped anew; kmsd database show d",
		"rekey of e: 9 of 10, 1 failed; kmsd database show e",
	}
	var got []string
	lines, _, _ := reading(t, m, "status")
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "rekey of ") {
			got = append(got, lines.Text())
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What is said of a member below the table: what is wrong, how far it is, what to do.
func TestStatusSaysWhatToDo(t *testing.T) {
	soon := time.Now().Add(time.Hour)
	for _, c := range []struct {
		name   string
		member api.Member
		want   []string // the lines, without the member's name
	}{
		{"a member in step needs no words", api.Member{State: api.MemberActive, CKR: "CKR_OK"}, nil},
		{"one that is away is tried again", api.Member{State: api.MemberDown, CKR: "CKR_TOKEN_NOT_PRESENT", Reason: "no token is there", RecoveryAttempts: 3, NextRecovery: &soon},
			[]string{"CKR_TOKEN_NOT_PRESENT: no token is there; attempt 4 soon"}},
		{"what its library has said is not hidden by the state's CKR", api.Member{State: api.MemberDown, CKR: "CKR_TOKEN_NOT_PRESENT", Reason: "CKR_PARTITION_DISABLED: activate it", NextRecovery: &soon},
			[]string{"CKR_PARTITION_DISABLED: activate it; attempt 1 soon"}},
		{"one that nobody tries again by itself needs somebody", api.Member{State: api.MemberDown, Reason: "the driver has ended"},
			[]string{"the driver has ended", "no attempt is planned; to make one: kmsd member recover hsm-a"}},
		{"one that was given up needs somebody", api.Member{State: api.MemberDown, CKR: "CKR_TOKEN_NOT_PRESENT", Reason: "no token is there", RecoveryAttempts: 4, GaveUp: true},
			[]string{"CKR_TOKEN_NOT_PRESENT: no token is there", "recovery has given up, attempts: 4", "when it is mended: kmsd member recover hsm-a"}},
		{"one that has failed needs somebody", api.Member{State: api.MemberFailed, CKR: "CKR_PIN_INCORRECT", Reason: "logging in: CKR_PIN_INCORRECT"},
			[]string{"logging in: CKR_PIN_INCORRECT", "when it is mended: kmsd member recover hsm-a", "if it has another token now: kmsd member replace hsm-a"}},
		{"a reason that says what to do needs no more words", api.Member{State: api.MemberFailed, Reason: "another token; accept it with: kmsd member replace hsm-a"},
			[]string{"another token; accept it with: kmsd member replace hsm-a"}},
		{"nor does one that says that recovery has given up", api.Member{State: api.MemberDown, Reason: "no token (given up after 2 attempts; then: kmsd member recover hsm-a)", GaveUp: true},
			[]string{"no token (given up after 2 attempts; then: kmsd member recover hsm-a)"}},
		{"one that is brought in step says how far it is", api.Member{State: api.MemberSyncing, Sync: &api.Progress{Done: 3120, Total: 10000, Rate: 850.2, Left: api.Duration(8100 * time.Millisecond)}},
			[]string{"syncing 3,120 of 10,000, 850/s, 8 s left"}},
		{"and slowly at the start", api.Member{State: api.MemberSyncing, Sync: &api.Progress{Done: 7, Total: 1234567, Rate: 0.44, Left: api.Duration(90 * time.Minute)}},
			[]string{"syncing 7 of 1,234,567, 0.4/s, 1h30m0s left"}},
		{"and without a rate before that is known", api.Member{State: api.MemberSyncing, Sync: &api.Progress{Total: 100}},
			[]string{"syncing 0 of 100"}},
		{"one that drains says how to end that", api.Member{State: api.MemberDraining, Role: api.RoleStandby},
			[]string{"takes nothing new; to end that: kmsd member standby hsm-a"}},
		{"what its token warns of is told, and what else there is to know is not", api.Member{State: api.MemberActive, Token: api.Token{Facts: []api.Fact{
			{Name: "storage", Value: "97 % of 2 MiB used", Warning: true}, {Name: "protocols", Value: "cpv4"}}}},
			[]string{"warning: storage: 97 % of 2 MiB used"}},
		{"what is strange on it is counted", api.Member{State: api.MemberActive, Foreign: 3, Quarantined: 1},
			[]string{"copies with another value, in quarantine: 1; kmsd group sync names them", "objects that nobody here knows: 3; kmsd group sync lists them"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.member.Name = "hsm-a"
			asked := time.Now()
			var got []string
			lines, _, _ := reading(t, &memberIs{member: c.member}, "status")
			for lines.Scan() {
				if text, ok := strings.CutPrefix(lines.Text(), "hsm-a: "); ok {
					got = append(got, text)
				}
				if len(lines.Text()) > 80 {
					t.Errorf("%q does not fit a terminal of 80 columns", lines.Text())
				}
			}
			for i := range got {
				got[i] = withoutTime(t, got[i], asked, soon)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("lines %q, want %q", got, c.want)
			}
		})
	}
}

// withoutTime says "soon" for the time until next, which was told after asked.
func withoutTime(t *testing.T, text string, asked, next time.Time) string {
	t.Helper()
	before, after, ok := strings.Cut(text, "; attempt ")
	if !ok {
		return text
	}
	number, left, _ := strings.Cut(after, " in ")
	const rounded = time.Second / 2
	if d, err := time.ParseDuration(left); err != nil || d < time.Until(next)-rounded || d > next.Sub(asked)+rounded {
		t.Errorf("%q, want the time until the attempt, which is %v", text, time.Until(next))
	}
	return before + "; attempt " + number + " soon"
}

// slowSync is a Memory whose member is being brought in step until the progress has
// been looked at twice.
type slowSync struct {
	memberIs
	looks chan struct{}
}

func (s *slowSync) Status() api.Status {
	select {
	case s.looks <- struct{}{}:
	default:
	}
	return s.memberIs.Status()
}

func (s *slowSync) Sync(ctx context.Context, group string, _ api.SyncOptions) (api.SyncReport, error) {
	for range 2 {
		select {
		case <-s.looks:
		case <-ctx.Done():
		}
	}
	return api.SyncReport{Group: group, Members: []api.MemberSync{}}, ctx.Err()
}

// A person sees on a terminal how far a long work is; when it is over, the line is gone.
func TestLongWorkShowsItsProgressOnATerminal(t *testing.T) {
	svc := &slowSync{looks: make(chan struct{})}
	svc.member = api.Member{Name: "hsm-a", State: api.MemberSyncing, Sync: &api.Progress{Done: 3120, Total: 10000, Rate: 850, Left: api.Duration(8 * time.Second)}}
	near, far := openTerminal(t)
	args := serving(t, svc, "group", "sync", "default")
	code := app.Main(t.Context(), args, app.Streams{In: strings.NewReader(""), Out: new(bytes.Buffer), Err: far})
	far.Close()
	shown, err := io.ReadAll(near) // ends with EIO, as a terminal does
	if !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	text := string(shown)
	if code != 0 || !strings.Contains(text, "hsm-a  [#######.................]  3,120 of 10,000, 850/s, 8 s left\x1b[K") || !strings.HasSuffix(text, "\r\x1b[K") {
		t.Errorf("exit code %d, the terminal has %q", code, text)
	}
}

// openTerminal returns both ends of a new terminal.
func openTerminal(t *testing.T) (near, far *os.File) {
	t.Helper()
	near, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close() })
	if err := unix.IoctlSetPointerInt(int(near.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(near.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	far, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return near, far
}
