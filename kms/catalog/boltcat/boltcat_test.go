package boltcat_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
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

	bolt "go.etcd.io/bbolt"

	"kmsd/internal/leaktest"
	"kmsd/kms/catalog"
	"kmsd/kms/catalog/boltcat"
	"kmsd/kms/catalog/catalogtest"
)

// childEnv makes the test binary a process that writes into the catalog it names.
const childEnv = "BOLTCAT_TEST_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		if err := writeForEver(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
	leaktest.Main(m)
}

func TestStore(t *testing.T) {
	paths := make(map[catalog.Store]string)
	catalogtest.Run(t, catalogtest.Config{
		Open: func(t *testing.T) catalog.Store {
			path := filepath.Join(t.TempDir(), "catalog.db")
			s := mustOpen(t, path)
			paths[s] = path
			return s
		},
		Reopen: func(t *testing.T, s catalog.Store) catalog.Store {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			return mustOpen(t, paths[s])
		},
	})
}

func TestOpenRefuses(t *testing.T) {
	cases := []struct {
		name string
		make func(t *testing.T, path string)
		is   error
		says string
	}{
		{"a file that its group may read", func(t *testing.T, path string) {
			mustOpen(t, path).Close()
			os.Chmod(path, 0o640)
		}, nil, "its mode is 0640"},
		{"a file that everybody may write", func(t *testing.T, path string) {
			mustOpen(t, path).Close()
			os.Chmod(path, 0o602)
		}, nil, "nobody but its owner"},
		{"a folder", func(t *testing.T, path string) { os.Mkdir(path, 0o700) }, nil, "directory"},
		{"a folder that is missing", func(t *testing.T, path string) { os.Remove(filepath.Dir(path)) }, fs.ErrNotExist, "creating it"},
		{"a file of something else", func(t *testing.T, path string) {
			write(t, path, []byte(strings.Repeat("something else ", 10000)))
		}, catalog.ErrDamaged, "invalid database"},
		{"a bbolt file of something else", func(t *testing.T, path string) {
			alter(t, path, func(tx *bolt.Tx) error { _, err := tx.CreateBucket([]byte("theirs")); return err })
		}, nil, "not a catalog of kmsd"},
		{"a newer schema, by name", func(t *testing.T, path string) {
			mustOpen(t, path).Close()
			alter(t, path, func(tx *bolt.Tx) error { return tx.Bucket([]byte("meta")).Put([]byte("schema"), []byte("7")) })
		}, catalog.ErrSchema, `schema "7", this kmsd knows schema "2"`},
		{"a record that was altered", func(t *testing.T, path string) {
			fill(t, path)
			alter(t, path, func(tx *bolt.Tx) error {
				b := tx.Bucket([]byte("key"))
				v := append([]byte(nil), b.Get([]byte("key-1"))...)
				v[len(v)-1] ^= 1
				return b.Put([]byte("key-1"), v)
			})
		}, catalog.ErrDamaged, `key "key-1" does not match its check sum`},
		{"a record in another's place", func(t *testing.T, path string) {
			fill(t, path)
			alter(t, path, func(tx *bolt.Tx) error {
				b := tx.Bucket([]byte("key"))
				return b.Put([]byte("key-1"), append([]byte(nil), b.Get([]byte("key-2"))...))
			})
		}, catalog.ErrDamaged, `key "key-1"`},
		{"a record that is cut", func(t *testing.T, path string) {
			fill(t, path)
			alter(t, path, func(tx *bolt.Tx) error { return tx.Bucket([]byte("key")).Put([]byte("key-1"), []byte("short")) })
		}, catalog.ErrDamaged, `key "key-1" has 5 bytes`},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "dir")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "catalog.db")
			c.make(t, path)
			s, err := boltcat.Open(path)
			if err == nil {
				s.Close()
				t.Fatal("it is opened")
			}
			if c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), path) {
				t.Errorf("error %q, want the path, %q and %v", err, c.says, c.is)
			}
		})
	}
}

func TestNewCatalogIsPrivateAndLeavesNothingElse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "catalog.db")
	s := mustOpen(t, path)
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v, want mode 0600", info.Mode(), err)
	}
	s.Close()
	entries, _ := os.ReadDir(filepath.Dir(path))
	if len(entries) != 1 {
		t.Errorf("after Close there is %v, want the catalog only", entries)
	}
}

func TestSecondOpenNamesTheHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "catalog.db")
	child, acks := startChild(t, path)
	if !acks.Scan() {
		t.Fatal("the child wrote nothing")
	}
	_, err := boltcat.Open(path)
	if !errors.Is(err, catalog.ErrInUse) || !strings.Contains(err.Error(), fmt.Sprintf("process %d has it", child.Process.Pid)) {
		t.Errorf("error %q, want ErrInUse and the child's number %d", err, child.Process.Pid)
	}
	endChild(child)
	mustOpen(t, path).Close() // the lock ended with the process, though its .pid is left

	s := mustOpen(t, path)
	defer s.Close()
	if _, err := boltcat.Open(path); !errors.Is(err, catalog.ErrInUse) || !strings.Contains(err.Error(), "this process has it") {
		t.Errorf("opened twice: %v", err)
	}
}

func TestAcknowledgedRecordsSurviveSIGKILL(t *testing.T) {
	path := filepath.Join(t.TempDir(), "catalog.db")
	acknowledged := make(map[string]bool)
	for round := range 30 {
		child, acks := startChild(t, path)
		after := 1 + rand.IntN(200)
		for n := 0; acks.Scan(); n++ {
			acknowledged[acks.Text()] = true
			if n == after { // what is still in the pipe was acknowledged too
				_ = child.Process.Kill()
			}
		}
		endChild(child)

		s := mustOpen(t, path)
		for id := range acknowledged {
			r, err := s.Get(t.Context(), catalog.KindKey, id)
			if err != nil || string(r.Value) != "value of "+id {
				t.Fatalf("round %d: acknowledged %q: %q, %v", round, id, r.Value, err)
			}
		}
		s.Close()
	}
	if len(acknowledged) < 30 {
		t.Errorf("only %d records were acknowledged", len(acknowledged))
	}
}

// writeForEver is the child: several goroutines write records and print the ID of
// each as soon as it is acknowledged.
func writeForEver(path string) error {
	s, err := boltcat.Open(path)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				id := fmt.Sprintf("%d-%d-%d", os.Getpid(), g, i)
				if _, err := s.Apply(context.Background(), record(id, "value of "+id)); err != nil {
					fmt.Fprintln(os.Stderr, err)
					return
				}
				fmt.Println(id) // one write(2), so lines are whole
			}
		})
	}
	wg.Wait()
	return errors.New("no writer is left")
}

func startChild(t *testing.T, path string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
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
	t.Cleanup(func() { endChild(child) })
	return child, bufio.NewScanner(out)
}

func endChild(child *exec.Cmd) {
	_ = child.Process.Kill()
	_ = child.Wait()
}

// It limits the size of files in this process, so that a write fails
// in the middle. It must not run in parallel.
func TestAfterAFailedWriteTheCatalogIsReadButNotChanged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "catalog.db")
	fill(t, path)
	s := mustOpen(t, path)
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	full := old
	full.Cur = 4096
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &full); err != nil {
		t.Fatal(err)
	}
	_, failed := s.Apply(t.Context(), record("big", strings.Repeat("v", 1<<20)))
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	if failed == nil || !strings.Contains(failed.Error(), "file too large") || !strings.Contains(failed.Error(), path) {
		t.Errorf("error %v, want the path and the cause", failed)
	}
	if _, err := s.Apply(t.Context(), record("next", "v")); err == nil || !strings.Contains(err.Error(), "until kmsd is started anew") {
		t.Errorf("the next write: %v", err)
	}
	if _, err := s.Get(t.Context(), catalog.KindKey, "key-7"); err != nil {
		t.Errorf("reading: %v", err)
	}
	s.Close()
	s = mustOpen(t, path)
	defer s.Close()
	for i := range 300 {
		if _, err := s.Get(t.Context(), catalog.KindKey, fmt.Sprintf("key-%d", i)); err != nil {
			t.Errorf("after opening it again: %v", err)
		}
	}
	if _, err := s.Apply(t.Context(), record("next", "v")); err != nil {
		t.Error(err)
	}
}

func TestDamagedFilesAreErrorsNeverPanics(t *testing.T) {
	path := filepath.Join(t.TempDir(), "catalog.db")
	fill(t, path)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("cut at every kilobyte", func(t *testing.T) {
		for n := 0; n < len(whole); n += 1024 {
			useDamaged(t, whole[:n])
		}
	})
	t.Run("a page of zeros", func(t *testing.T) {
		for n := 0; n+4096 <= len(whole); n += 4096 {
			b := append([]byte(nil), whole...)
			clear(b[n : n+4096])
			useDamaged(t, b)
		}
	})
	t.Run("altered bytes", func(t *testing.T) {
		rnd := rand.New(rand.NewPCG(1, 2))
		for range 150 {
			b := append([]byte(nil), whole...)
			for range 1 + rnd.IntN(3) {
				b[rnd.IntN(len(b))] ^= byte(1 + rnd.IntN(255))
			}
			useDamaged(t, b)
		}
	})
}

// useDamaged opens and uses what may be a catalog. It must not panic, and what it
// reads must be what was written.
func useDamaged(t *testing.T, file []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "catalog.db")
	write(t, path, file)
	s, err := boltcat.Open(path)
	if err != nil {
		return
	}
	defer s.Close()
	for _, kind := range catalog.Kinds() {
		for r, err := range s.List(t.Context(), kind, "", "", 0) {
			if err == nil && string(r.Value) != "value of "+r.ID {
				t.Errorf("%s %q has another value", r.Kind, r.ID)
			}
		}
	}
	_, _ = s.Apply(t.Context(), record("new", "value of new"))
}

func BenchmarkApply(b *testing.B) {
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			s := mustOpen(b, filepath.Join(b.TempDir(), "catalog.db"))
			defer s.Close()
			value := strings.Repeat("v", 500)
			next := make(chan int)
			var wg sync.WaitGroup
			for range callers {
				wg.Go(func() {
					for i := range next {
						if _, err := s.Apply(b.Context(), record(fmt.Sprintf("key-%d", i), value)); err != nil {
							b.Error(err)
						}
					}
				})
			}
			start := time.Now()
			for i := range b.N {
				next <- i
			}
			close(next)
			wg.Wait()
			b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "applies/s")
		})
	}
}

func BenchmarkGet(b *testing.B) {
	s := mustOpen(b, filepath.Join(b.TempDir(), "catalog.db"))
	defer s.Close()
	if _, err := s.Apply(b.Context(), record("a", strings.Repeat("v", 500))); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.Get(b.Context(), catalog.KindKey, "a"); err != nil {
			b.Fatal(err)
		}
	}
}

func record(id, value string) catalog.Record {
	return catalog.Record{Kind: catalog.KindKey, ID: id, Value: []byte(value)}
}

func mustOpen(t testing.TB, path string) *boltcat.Store {
	t.Helper()
	s, err := boltcat.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func fill(t *testing.T, path string) {
	t.Helper()
	s := mustOpen(t, path)
	defer s.Close()
	var batch []catalog.Record
	for i := range 300 {
		id := fmt.Sprintf("key-%d", i)
		batch = append(batch, record(id, "value of "+id))
	}
	if _, err := s.Apply(t.Context(), batch...); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func alter(t *testing.T, path string, f func(*bolt.Tx) error) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(f); err != nil {
		t.Fatal(err)
	}
}
