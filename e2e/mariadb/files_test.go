package mariadb_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"kmsd/internal/mariadbtest"
)

// pattern is in every row that the search below looks for.
const pattern = "a row that nobody may read on disk"

// spilling makes everything that can go to a file go there soon, and keeps a binary log.
var spilling = []string{
	"log_bin=binlog", "binlog_cache_size=4096", "sort_buffer_size=32K", "tmp_memory_table_size=0", "max_heap_table_size=16K",
	"innodb_buffer_pool_size=6M", "aria_pagecache_buffer_size=256K", "lock_wait_timeout=10",
}

// rowFiles are the kinds of files that MariaDB writes rows to, and encrypts.
var rowFiles = []string{"InnoDB table", "InnoDB redo log", "InnoDB temporary tables", "Aria table", "binary log", "deleted file"}

// leftOpen are those that MariaDB 10.11 does not encrypt whatever is configured: the tables
// that it makes for a query, and the log of crash-safe Aria tables. docs/databases.md says so.
var leftOpen = []string{"table that a query needs", "Aria log"}

// kindOf names what a file is.
func kindOf(path string) string {
	name := filepath.Base(path)
	switch {
	case strings.HasSuffix(path, " (deleted)"): // of a sort or a transaction
		return "deleted file"
	case name == "ib_logfile0":
		return "InnoDB redo log"
	case name == "ibtmp1":
		return "InnoDB temporary tables"
	case strings.HasPrefix(name, "binlog.0"):
		return "binary log"
	case strings.HasPrefix(name, "aria_log"):
		return "Aria log"
	case strings.HasPrefix(name, "#sql"):
		return "table that a query needs"
	case strings.HasSuffix(name, ".ibd"):
		return "InnoDB table"
	case strings.HasSuffix(name, ".MAD"):
		return "Aria table"
	}
	return name
}

func TestNoRowIsReadableInAnyFile(t *testing.T) {
	s := start(t, spilling...)
	encrypted := findRows(t, s.mariadb)
	plain := &site{mariadb: newMariaDB(t, spilling...)}
	plain.startMariaDB(t)
	plain.do(t, "CREATE DATABASE shop")
	control := findRows(t, plain.mariadb)

	for kind, paths := range encrypted {
		if slices.Contains(leftOpen, kind) {
			t.Logf("as is known of this version, a row is readable in a file that is %s: %v", kind, paths)
			continue
		}
		t.Errorf("a row is readable in a file that is %s: %v", kind, paths)
	}
	for _, kind := range rowFiles {
		if len(control[kind]) == 0 {
			t.Errorf("without encryption, too, no row is found in a file that is %s: the search proves nothing", kind)
		}
	}
}

// findRows writes rows in all the ways that there are. It returns the files in which one can
// be read while the server runs or after it was killed. :: kind → paths
func findRows(t *testing.T, m *mariadbtest.Server) map[string][]string {
	t.Helper()
	db := m.DB()
	const columns = " (id INT PRIMARY KEY, text VARCHAR(200)) "
	const rows = " SELECT seq, RPAD(?, 150, '.') FROM shop.seq_1_to_3000"
	do(t, db, "CREATE TABLE shop.orders"+columns+"ENGINE=InnoDB")
	do(t, db, "INSERT INTO shop.orders"+rows, pattern)
	do(t, db, "CREATE TABLE shop.people"+columns+"ENGINE=Aria")
	do(t, db, "INSERT INTO shop.people"+rows, pattern)
	do(t, db, "FLUSH TABLES shop.people")

	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	do(t, conn, "FLUSH TABLES shop.orders FOR EXPORT") // writes its pages
	do(t, conn, "UNLOCK TABLES")
	do(t, conn, "CREATE TEMPORARY TABLE shop.basket"+columns+"ENGINE=InnoDB")
	do(t, conn, "INSERT INTO shop.basket SELECT seq, RPAD(?, 150, '.') FROM shop.seq_1_to_60000", pattern) // more than the buffer pool
	do(t, conn, "BEGIN")
	do(t, conn, "UPDATE shop.orders SET text = CONCAT(text, '!')")
	// An answer that nobody reads to its end.
	open, err := db.QueryContext(t.Context(), "SELECT * FROM shop.people a, (SELECT 1 UNION SELECT 2) b ORDER BY text DESC")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if !open.Next() {
		t.Fatalf("the sort has no rows: %v", open.Err())
	}

	found := map[string][]string{}
	searchOpenFiles(t, m.PID(), found)
	m.Kill()
	searchFiles(t, m.Dir, found)
	return found
}

// searchOpenFiles looks into the files that a process has open, also those that have no name
// any more.
func searchOpenFiles(t *testing.T, pid int, found map[string][]string) {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(fds) == 0 {
		t.Fatalf("process %d has no open files: %v", pid, err)
	}
	for _, fd := range fds {
		if info, err := os.Stat(fd); err != nil || !info.Mode().IsRegular() {
			continue // a socket, a folder, or closed meanwhile
		}
		name, err := os.Readlink(fd)
		if err != nil {
			continue
		}
		searchFile(t, fd, name, found)
	}
}

// searchFiles looks into every file below dir.
func searchFiles(t *testing.T, dir string, found map[string][]string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			searchFile(t, path, path, found)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func searchFile(t *testing.T, path, name string, found map[string][]string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENXIO) {
		return // it has gone meanwhile, or the number is that of a socket now
	}
	if err != nil {
		t.Fatal(err)
	}
	kind := kindOf(name)
	if bytes.Contains(b, []byte(pattern)) && !slices.Contains(found[kind], name) {
		found[kind] = append(found[kind], name)
	}
}
