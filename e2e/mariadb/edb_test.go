package mariadb_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kmsd/kms/api"
)

// The commands of docs/databases.md for EDB Postgres. It runs them through a shell with the
// path of a file in the place of %p, and the data key, which is bytes of any value, on stdin
// of the first and on stdout of the second.
const (
	edbWrap   = `kmsd wrap edb --aad main --raw > "%p"`
	edbUnwrap = `kmsd unwrap edb --aad main --raw < "%p"`
)

func TestEDBKeepsItsKeyByTwoCommands(t *testing.T) {
	s := startKmsd(t)
	if _, err := s.c.CreateMasterKey(t.Context(), "edb", api.KeyOptions{}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "databases.md"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key.bin")
	shell := func(command string, stdin []byte) (stdout []byte, err error) {
		t.Helper()
		if !strings.Contains(string(text), command) {
			t.Errorf("docs/databases.md has another command than %s", command)
		}
		ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
		defer cancel()
		cmd := exec.CommandContext(ctx, "/bin/sh", "-c", strings.ReplaceAll(command, "%p", path))
		cmd.Stdin = bytes.NewReader(stdin)
		cmd.Env = []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "KMSD_ADDR=" + s.kmsd.Env.Addr, "KMSD_CACERT=" + s.kmsd.Env.CACert, "KMSD_TOKEN=" + s.kmsd.Env.Token}
		cmd.WaitDelay = time.Second
		return cmd.Output()
	}

	key := make([]byte, 257) // no whole number of anything, with zeros and line ends in it
	rand.Read(key)
	copy(key, "\x00\r\n\n\xff")
	key[len(key)-1] = '\n'
	if out, err := shell(edbWrap, key); err != nil || len(out) != 0 {
		t.Fatalf("wrapping: %v, and on stdout %d bytes", err, len(out))
	}
	kept, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(kept, key[:16]) {
		t.Error("the file holds the key itself")
	}
	for _, when := range []string{"before a rotation", "after it"} {
		if out, err := shell(edbUnwrap, nil); err != nil || !bytes.Equal(out, key) {
			t.Errorf("unwrapping %s: %v, %d bytes; want the key", when, err, len(out))
		}
		if _, err := s.c.Rotate(t.Context(), "edb"); err != nil {
			t.Fatal(err)
		}
	}

	if err := os.WriteFile(path, kept[:len(kept)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := shell(edbUnwrap, nil); err == nil || len(out) != 0 {
		t.Errorf("a file that was cut unwraps: %v, %d bytes", err, len(out))
	}
}
