// Package rekey_test answers: does a rekey of a large database keep every data key, and
// how fast is it?
//
// It runs on real tokens, with kmsd killed twice on the way, and looks at the result past
// kmsd: in its catalog.
package rekey_test

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/kms/client"
)

var (
	keys = flag.Int("keys", 20_000, "how many data keys the database has")
	rate = flag.Float64("rate", 0, "data keys a second that the rekey must reach; 0: any")
)

// startTimeout is for kmsd to answer: it reads all of its catalog first.
const startTimeout = 5 * time.Minute

const (
	database = "store"
	// everyOld is how many data keys there are for each that has an older version too.
	everyOld = 10
)

// total is how many versions the data keys have together.
func total() int { return *keys + (*keys+everyOld-1)/everyOld }

// bin is the folder with the programs.
var bin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	flag.Parse()
	dir, err := os.MkdirTemp("", "kmsd-rekey-") // not below a test's: the paths of sockets are short
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	if err := devserver.Build(context.Background(), dir, nil); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// site is a kmsd on three tokens that is stopped and started again.
type site struct {
	t      *testing.T
	config devserver.Config
	server *devserver.Server
	client *client.Client
	usage  usage
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, config: devserver.Config{Bin: bin, Dir: filepath.Join(t.TempDir(), "kmsd"), Env: []string{"TMPDIR=" + bin}}}
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	var err error
	if s.server, err = devserver.Start(ctx, s.config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.server.Kill()
		if t.Failed() {
			b, _ := os.ReadFile(s.server.Log)
			t.Logf("the last that kmsd said:\n%s", b[max(0, len(b)-10_000):])
		}
	})
	s.dial()
	if _, err := devserver.AwaitWhole(ctx, s.client); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) dial() {
	s.t.Helper()
	c, err := s.server.Env.Client(1)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	s.client = c
}

func (s *site) catalog() string { return filepath.Join(s.config.Dir, "catalog.db") }

// stop ends kmsd politely, so that its catalog can be opened.
func (s *site) stop() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	if err := s.server.Stop(ctx); err != nil {
		s.t.Fatal(err)
	}
}

// serve starts kmsd again, and returns when every member serves.
func (s *site) serve() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), startTimeout)
	defer cancel()
	server, err := devserver.Serve(ctx, s.config, s.server.Env)
	if err != nil {
		s.t.Fatal(err)
	}
	s.server = server
	s.dial()
	if _, err := devserver.AwaitWhole(ctx, s.client); err != nil {
		s.t.Fatal(err)
	}
}

func TestRekeySurvivesKillsAndLosesNothing(t *testing.T) {
	s := newSite(t)
	if _, err := s.client.CreateDatabase(t.Context(), database, api.DatabaseOptions{}); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	s.fill()
	t.Logf("%d data keys with %d versions were made in %v", *keys, total(), time.Since(begin).Round(time.Millisecond))

	s.serve()
	job, err := s.client.Rekey(t.Context(), database, api.RekeyOptions{Retire: api.RetireDisable})
	if err != nil {
		t.Fatal(err)
	}
	if job.Progress.Total != total() {
		t.Errorf("the job is to do %d, want %d", job.Progress.Total, total())
	}
	var worked time.Duration
	for _, share := range []float64{0.1 + 0.3*rand.Float64(), 0.5 + 0.3*rand.Float64(), 1} {
		took, now := s.follow(job.ID, share)
		worked += took
		t.Logf("%d of %d are done after %v of work", now.Progress.Done, total(), worked.Round(time.Millisecond))
		if job = now; share == 1 {
			break
		}
		s.server.Kill()
		begin := time.Now()
		s.serve()
		t.Logf("killed; kmsd serves again after %v", time.Since(begin).Round(time.Millisecond))
	}
	if p := job.Progress; job.State != api.JobDone || p.Done != total() || p.Total != total() || job.Skipped != 0 || job.Failed != 0 || job.Reason != "" {
		t.Errorf("the job ends as %+v; want all %d done, and none twice", job, total())
	}
	perSecond := float64(total()) / worked.Seconds()
	t.Logf("%.0f versions a second; %v", perSecond, &s.usage)
	if perSecond < *rate {
		t.Errorf("the rekey did %.0f versions a second, want %.0f", perSecond, *rate)
	}
	s.check(job)
}

// follow looks at a job until so much of it is done, and returns how long that took.
func (s *site) follow(id string, share float64) (took time.Duration, job api.Job) {
	s.t.Helper()
	begin := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	from := s.usage.cpu(s.server.PID())
	for {
		var err error
		if job, err = s.client.Job(s.t.Context(), id); err != nil {
			s.t.Fatal(err)
		}
		s.usage.look(s.server.PID())
		switch {
		case job.State == api.JobDone || job.State == api.JobFailed,
			share < 1 && float64(job.Progress.Done) >= share*float64(total()):
			s.usage.worked += s.usage.cpu(s.server.PID()) - from
			return time.Since(begin), job
		}
		<-tick.C
	}
}

// idOf is the name of a data key, and plaintextOf what a version of it is.
func idOf(i int) string { return fmt.Sprintf("table/%08d", i) }

func plaintextOf(i, version int) []byte {
	b := make([]byte, 32)
	binary.BigEndian.PutUint64(b, uint64(i))
	b[31] = byte(version)
	return b
}
