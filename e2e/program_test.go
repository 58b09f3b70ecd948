package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"kmsd/internal/devserver"
)

// programEnds is for any program to end: a demo gives itself three minutes.
const programEnds = 4 * time.Minute

// runProgram runs a program to its end.
func runProgram(t *testing.T, env []string, stdin, path string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), programEnds)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")}, env...)
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("running %s %v: %v", path, args, err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func send(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if pid <= 0 {
		t.Fatalf("there is no process %d to send %v to", pid, sig)
	}
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatalf("sending %v to process %d: %v", sig, pid, err)
	}
}

// awaitGone waits until none of the processes is there, zombies not counted: they
// have ended.
func awaitGone(t *testing.T, limit time.Duration, pids ...int) {
	t.Helper()
	await(t, limit, func(ctx context.Context) error {
		return devserver.Poll(ctx, func() error {
			for _, pid := range pids {
				if running(pid) {
					return fmt.Errorf("process %d still runs", pid)
				}
			}
			return nil
		})
	})
}

func running(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// The state follows the name, which is in parentheses.
	_, rest, ok := bytes.Cut(b, []byte(") "))
	return ok && len(rest) > 0 && rest[0] != 'Z' && rest[0] != 'X'
}
