package e2e_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"kmsd/e2e/look"
	"kmsd/internal/devserver"
)

// secret is something that must stay where it is.
type secret struct {
	what string
	home string // the only file that may hold it; "" for none
	form []byte
}

// forms are the ways in which a secret may be written down by accident.
func forms(what, home string, value []byte) []secret {
	// Of base64 the part that is the same whatever follows.
	b64 := base64.StdEncoding.EncodeToString(value[:len(value)/3*3])
	return []secret{
		{what, home, value},
		{what + " in hexadecimal", home, []byte(hex.EncodeToString(value))},
		{what + " in base64", home, []byte(b64)},
		{what + " as Go prints bytes", home, []byte(strings.Trim(fmt.Sprint(value), "[]"))},
	}
}

// secretsOf returns every PIN, those of the security officers too, and the domain
// secret.
func secretsOf(t *testing.T, cfg look.Config) []secret {
	t.Helper()
	var all []secret
	for _, g := range cfg.Groups {
		all = append(all, forms("the domain secret", g.Domain.File, readSecret(t, g.Domain.File))...)
		for _, m := range g.Members {
			all = append(all, forms("the PIN of "+m.Name, m.PIN.File, readSecret(t, m.PIN.File))...)
			soPIN := strings.TrimSuffix(m.PIN.File, ".pin") + ".so-pin"
			all = append(all, forms("the SO PIN of "+m.Name, soPIN, readSecret(t, soPIN))...)
		}
	}
	for _, s := range all {
		if len(s.form) < 6 {
			t.Fatalf("%s has %d bytes; a search for it would find anything", s.what, len(s.form))
		}
	}
	return all
}

func TestSecretsStayWhereTheyAre(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	cfg := configOf(t, s)
	dek := random(32)
	secrets := append(secretsOf(t, cfg), forms("a data key", "", dek)...)

	// Work, faults and failures first, as all of them write.
	createKey(t, c, "shop")
	wrapped := wrap(t, c, "shop", dek, nil)
	if _, err := c.Unwrap(t.Context(), "shop", wrapped, []byte("another aad")); err == nil {
		t.Error("another aad unwraps")
	}
	if _, err := c.Rotate(t.Context(), "shop"); err != nil {
		t.Fatal(err)
	}
	searchProcesses(t, s, secrets)
	m := group(t, c).Members[0]
	send(t, m.DriverPID, syscall.SIGKILL)
	awaitReplaced(t, c, m)
	searchProcesses(t, s, secrets)

	searchFiles(t, filepath.Dir(s.Dir), secrets)
	// The search does find what is there.
	if found := findIn([]byte("x"+string(secrets[0].form)+"y"), secrets); len(found) == 0 {
		t.Error("the search finds nothing")
	}
}

// searchProcesses looks at the command line and environment of kmsd and its
// drivers, and makes sure that none of them can leave a core.
func searchProcesses(t *testing.T, s *devserver.Server, secrets []secret) {
	t.Helper()
	pids := []int{s.PID()}
	for _, m := range group(t, dial(t, s)).Members {
		pids = append(pids, m.DriverPID)
	}
	for _, pid := range pids {
		for _, file := range []string{"cmdline", "environ"} {
			path := fmt.Sprintf("/proc/%d/%s", pid, file)
			b, err := os.ReadFile(path)
			if err != nil && os.Geteuid() != 0 && os.IsPermission(err) {
				continue // the process is not dumpable: only root may look
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, found := range findIn(b, secrets) {
				t.Errorf("%s is in %s", found.what, path)
			}
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
		if err != nil {
			t.Fatal(err)
		}
		if soft, hard := coreLimit(string(b)); soft != "0" || hard != "0" {
			t.Errorf("process %d may leave a core of %s bytes (hard limit %s)", pid, soft, hard)
		}
		checkNotDumpable(t, pid)
	}
}

// coreLimit reads the line "Max core file size  0  0  bytes" of /proc/PID/limits.
func coreLimit(limits string) (soft, hard string) {
	for line := range strings.Lines(limits) {
		if rest, ok := strings.CutPrefix(line, "Max core file size"); ok {
			if f := strings.Fields(rest); len(f) >= 2 {
				return f[0], f[1]
			}
		}
	}
	return "?", "?"
}

// checkNotDumpable: the files in /proc of a process that is not dumpable belong to
// root, whoever runs it (proc(5)). As root there is no difference to be seen.
func checkNotDumpable(t *testing.T, pid int) {
	t.Helper()
	info, err := os.Stat(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		t.Fatal(err)
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; owner != 0 {
		t.Errorf("process %d is dumpable: /proc/%d/environ belongs to user %d", pid, pid, owner)
	}
}

// searchFiles looks into every file below root, logs and tokens included.
func searchFiles(t *testing.T, root string, secrets []secret) {
	t.Helper()
	files := 0
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it was one that is made for a moment, and has gone
		}
		if err != nil {
			return err
		}
		files++
		for _, found := range findIn(b, secrets) {
			if path != found.home {
				t.Errorf("%s is in %s", found.what, path)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d files searched", files)
}

func findIn(b []byte, secrets []secret) []secret {
	return slices.DeleteFunc(slices.Clone(secrets), func(s secret) bool { return !bytes.Contains(b, s.form) })
}
