package devserver_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kmsd/internal/devserver"
	"kmsd/kms/api"
)

// program writes a shell script that stands for kmsd; $3 is the directory.
func program(t *testing.T, script string) devserver.Config {
	t.Helper()
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "kmsd"), []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	return devserver.Config{Bin: bin, Dir: filepath.Join(t.TempDir(), "dev")}
}

const answering = `mkdir -p $3
cat > $3/env <<END
# how to reach it
export KMSD_ADDR=https://127.0.0.1:1
export KMSD_CACERT='$3/ca.pem'
export KMSD_TOKEN="secret"
END
mv $3/env $3/env.sh
echo answering
`

func TestStartWaitsForTheEnvironmentAndStopEndsIt(t *testing.T) {
	cfg := program(t, "trap 'exit 0' TERM\n"+answering+"while :; do sleep 0.01; done\n")
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	stale := "KMSD_ADDR=https://stale\nKMSD_CACERT=x\nKMSD_TOKEN=x\n"
	if err := os.WriteFile(filepath.Join(cfg.Dir, "env.sh"), []byte(stale), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := devserver.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Kill()
	want := devserver.Env{Addr: "https://127.0.0.1:1", CACert: cfg.Dir + "/ca.pem", Token: "secret"}
	if s.Env != want {
		t.Errorf("the environment is %+v, want %+v", s.Env, want)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Errorf("stopping: %v", err)
	}
}

func TestStartSaysWhyNothingAnswers(t *testing.T) {
	cfg := program(t, "echo no token anywhere >&2\nexit 3\n")
	_, err := devserver.Start(t.Context(), cfg)
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "no token anywhere") {
		t.Errorf("got %v; want the exit status and what was printed", err)
	}

	cfg = program(t, "exec sleep 60\n")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := devserver.Start(ctx, cfg); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v; want that the time is over and env.sh is not there", err)
	}
}

func TestStopReportsAnExitCode(t *testing.T) {
	s, err := devserver.Start(t.Context(), program(t, "trap 'exit 7' TERM\n"+answering+"while :; do sleep 0.01; done\n"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(t.Context()); err == nil || !strings.Contains(err.Error(), "exit status 7") {
		t.Errorf("got %v, want exit status 7", err)
	}
	s.Kill() // of a process that has ended is nothing
}

func TestAllActive(t *testing.T) {
	good := api.Member{Name: "a", State: api.MemberActive, Keys: 2}
	tests := []struct {
		name   string
		second api.Member
		want   string
	}{
		{"every member is in step", api.Member{Name: "b", State: api.MemberStandby, Keys: 2}, ""},
		{"a member is down", api.Member{Name: "b", State: api.MemberDown, Reason: "killed"}, "member b is down (killed)"},
		{"a key is missing", api.Member{Name: "b", State: api.MemberActive, Keys: 1, Missing: 1}, "holds 1 of 2 keys"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := devserver.AllActive(api.Group{Keys: 2, Members: []api.Member{good, tt.second}})
			if (err == nil) != (tt.want == "") || (err != nil && !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if devserver.AllActive(api.Group{}) == nil {
		t.Error("a group without members is whole")
	}
}

func TestPollEndsAtOnceOnAFinalError(t *testing.T) {
	n := 0
	want := errors.New("hopeless")
	err := devserver.Poll(t.Context(), func() error { n++; return devserver.Final(want) })
	if !errors.Is(err, want) || n != 1 {
		t.Errorf("got %v after %d calls", err, n)
	}
}
