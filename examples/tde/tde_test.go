package tde_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"kmsd/examples/tde"
	"kmsd/kms/api"
)

func create(t *testing.T, keys tde.Keys) (*tde.Database, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "shop")
	db, err := tde.Create(t.Context(), keys, dir, "shop")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db, dir
}

func reopen(t *testing.T, keys tde.Keys, db *tde.Database, dir string) *tde.Database {
	t.Helper()
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := tde.Open(keys, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func createTable(t *testing.T, db *tde.Database, name string) *tde.Table {
	t.Helper()
	table, err := db.CreateTable(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func openTable(t *testing.T, db *tde.Database, name string) *tde.Table {
	t.Helper()
	table, err := db.Table(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func insert(t *testing.T, table *tde.Table, rows ...[]byte) []tde.RowID {
	t.Helper()
	ids, err := table.Insert(rows...)
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

func rowsOf(t *testing.T, table *tde.Table) [][]byte {
	t.Helper()
	var rows [][]byte
	for row, err := range table.Rows() {
		if err != nil {
			t.Fatal(err)
		}
		rows = append(rows, row)
	}
	return rows
}

func someRows(n, size int) [][]byte {
	rows := make([][]byte, n)
	for i := range rows {
		rows[i] = fmt.Appendf(nil, "row %06d %s", i, strings.Repeat("x", size))
	}
	return rows
}

func equalRows(a, b [][]byte) bool { return slices.EqualFunc(a, b, bytes.Equal) }

func TestRowsSurviveARestart(t *testing.T) {
	keys := newFakeKeys()
	db, dir := create(t, keys)
	want := someRows(500, 100)
	ids := insert(t, createTable(t, db, "orders"), want...)
	createTable(t, db, "empty")

	db = reopen(t, keys, db, dir)
	table := openTable(t, db, "orders")
	if got := rowsOf(t, table); !equalRows(got, want) {
		t.Errorf("%d rows came back, not the %d inserted", len(got), len(want))
	}
	for i, id := range ids {
		if got, err := table.Get(id); err != nil || !bytes.Equal(got, want[i]) {
			t.Fatalf("Get(%v) = %q, %v; want %q", id, got, err, want[i])
		}
	}
	more := someRows(40, 300)
	insert(t, table, more...)
	if got := rowsOf(t, table); !equalRows(got, append(want, more...)) {
		t.Error("rows inserted after the restart do not follow the others")
	}
	if got := rowsOf(t, openTable(t, db, "empty")); len(got) != 0 {
		t.Errorf("the empty table has %d rows", len(got))
	}
	if names, err := db.Tables(); err != nil || !slices.Equal(names, []string{"empty", "orders"}) {
		t.Errorf("Tables() = %v, %v", names, err)
	}
}

func TestRekeyChangesTheWrappedKeyAndNoPage(t *testing.T) {
	keys := newFakeKeys()
	db, dir := create(t, keys)
	want := someRows(10, 10)
	table := createTable(t, db, "orders")
	insert(t, table, want...)
	before, _ := table.Envelope()
	pages, err := os.ReadFile(filepath.Join(dir, "orders.pages"))
	if err != nil {
		t.Fatal(err)
	}

	version, err := db.Rekey(t.Context())
	if err != nil || version != 2 {
		t.Fatalf("Rekey() = %d, %v; want version 2", version, err)
	}
	after, _ := table.Envelope()
	if bytes.Equal(before, after) || after[0] != 2 {
		t.Error("the table key is not wrapped with the new version")
	}
	if now, err := os.ReadFile(filepath.Join(dir, "orders.pages")); err != nil || !bytes.Equal(now, pages) {
		t.Errorf("the pages changed: %v", err)
	}
	insert(t, table, want...) // the open table goes on

	db = reopen(t, keys, db, dir)
	if got := rowsOf(t, openTable(t, db, "orders")); !equalRows(got, append(want, want...)) {
		t.Error("the rows did not come back under the new version")
	}
}

func TestARekeyThatStopsHalfWayGoesOnWithRewrap(t *testing.T) {
	keys := newFakeKeys()
	db, _ := create(t, keys)
	for _, name := range []string{"a", "b"} {
		insert(t, createTable(t, db, name), []byte(name))
	}
	if _, err := keys.Rotate(t.Context(), "shop"); err != nil {
		t.Fatal(err)
	}
	keys.fail = api.ErrGroupLost
	if err := db.Rewrap(t.Context()); !errors.Is(err, api.ErrGroupLost) || !strings.Contains(err.Error(), "table a") ||
		!strings.Contains(err.Error(), "table b") {
		t.Errorf("Rewrap() = %v; want group_lost for both tables", err)
	}
	keys.fail = nil
	if err := db.Rewrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		if wrapped, _ := openTable(t, db, name).Envelope(); wrapped[0] != 2 {
			t.Errorf("the key of table %s has version %d, want 2", name, wrapped[0])
		}
	}
}

func TestOpenTablesDoNotNeedKmsd(t *testing.T) {
	keys := newFakeKeys()
	db, dir := create(t, keys)
	table := createTable(t, db, "orders")
	keys.fail = api.ErrGroupLost
	insert(t, table, []byte("while nobody answers"))
	if got := rowsOf(t, table); len(got) != 1 {
		t.Errorf("%d rows, want 1", len(got))
	}
	db = reopen(t, keys, db, dir)
	if _, err := db.Table(t.Context(), "orders"); !errors.Is(err, api.ErrGroupLost) {
		t.Errorf("opening without kmsd: %v, want group_lost", err)
	}
	keys.fail = nil
	openTable(t, db, "orders")
}

func TestNothingReadableIsOnDisk(t *testing.T) {
	keys := newFakeKeys()
	db, dir := create(t, keys)
	marker := []byte("MARKER-4711-in-the-clear")
	table := createTable(t, db, "orders")
	for range 50 {
		insert(t, table, bytes.Repeat(marker, 10))
	}
	if _, err := db.Rekey(t.Context()); err != nil {
		t.Fatal(err)
	}
	found, searched, err := tde.FindPlaintext(dir, append(keys.issued, marker)...)
	if err != nil || len(found) != 0 || searched < tde.BlockSize {
		t.Errorf("found %v in %d bytes, %v", found, searched, err)
	}
}

func TestFindPlaintextFindsAMarkerAnywhere(t *testing.T) {
	for _, at := range []int{0, 1, 256<<10 - 5, 256 << 10, 600_000} {
		dir := t.TempDir()
		content := append(bytes.Repeat([]byte{'.'}, at), "needle"...)
		if err := os.WriteFile(filepath.Join(dir, "control"), append(content, "...needle"...), 0o600); err != nil {
			t.Fatal(err)
		}
		found, searched, err := tde.FindPlaintext(dir, []byte("a longer marker that is not there"), []byte("needle"), nil)
		want := tde.Finding{File: filepath.Join(dir, "control"), Offset: int64(at), Marker: 1}
		if err != nil || !slices.Equal(found, []tde.Finding{want}) || searched != int64(at+15) {
			t.Errorf("at %d: found %v in %d bytes, %v", at, found, searched, err)
		}
	}
}

func TestWhatDoesNotBelongIsRefused(t *testing.T) {
	tests := []struct {
		name   string
		spoil  func(t *testing.T, dir string)
		want   error
		reason string
	}{
		{"a bit of a page is flipped", func(t *testing.T, dir string) {
			edit(t, dir, "orders.pages", func(b []byte) []byte { b[100] ^= 1; return b })
		}, tde.ErrDamaged, "page 0 does not authenticate"},
		{"a page has another version", func(t *testing.T, dir string) {
			edit(t, dir, "orders.pages", func(b []byte) []byte { b[7]++; return b })
		}, tde.ErrDamaged, "page 0 does not authenticate"},
		{"two pages have changed places", func(t *testing.T, dir string) {
			edit(t, dir, "orders.pages", func(b []byte) []byte {
				return slices.Concat(b[tde.BlockSize:2*tde.BlockSize], b[:tde.BlockSize], b[2*tde.BlockSize:])
			})
		}, tde.ErrDamaged, "page 0 does not authenticate"},
		{"a page is another table's", func(t *testing.T, dir string) {
			other := read(t, dir, "people.pages")
			edit(t, dir, "orders.pages", func(b []byte) []byte { copy(b, other[:tde.BlockSize]); return b })
		}, tde.ErrDamaged, "page 0 does not authenticate"},
		{"the header is another table's", func(t *testing.T, dir string) {
			other := read(t, dir, "people.key")
			edit(t, dir, "orders.key", func([]byte) []byte { return other })
		}, api.ErrCorrupt, "unwrapping its key"},
		{"the header is cut short", func(t *testing.T, dir string) {
			edit(t, dir, "orders.key", func(b []byte) []byte { return b[:len(b)-1] })
		}, tde.ErrDamaged, "opening table orders"},
		{"the header is too long", func(t *testing.T, dir string) {
			edit(t, dir, "orders.key", func(b []byte) []byte { return make([]byte, 1<<20) })
		}, tde.ErrDamaged, "longer than"},
		{"the header is gone", func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, "orders.key"))
		}, fs.ErrNotExist, "opening table orders"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			keys := newFakeKeys()
			db, dir := create(t, keys)
			insert(t, createTable(t, db, "orders"), someRows(100, 100)...)
			insert(t, createTable(t, db, "people"), someRows(100, 100)...)
			tt.spoil(t, dir)
			err := readAll(t, reopen(t, keys, db, dir))
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.reason) {
				t.Errorf("got %v; want %v that says %q", err, tt.want, tt.reason)
			}
		})
	}
}

func readAll(t *testing.T, db *tde.Database) error {
	table, err := db.Table(t.Context(), "orders")
	if err != nil {
		return err
	}
	for _, err := range table.Rows() {
		if err != nil {
			return err
		}
	}
	return nil
}

func read(t *testing.T, dir, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func edit(t *testing.T, dir, file string, change func([]byte) []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, file), change(read(t, dir, file)), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestAPartOfAPageAtTheEndIsWrittenOver(t *testing.T) {
	keys := newFakeKeys()
	db, dir := create(t, keys)
	want := someRows(5, 5)
	insert(t, createTable(t, db, "orders"), want...)
	edit(t, dir, "orders.pages", func(b []byte) []byte { return append(b, b[:1000]...) })
	if err := os.WriteFile(filepath.Join(dir, "orders.key.tmp-1"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}

	db = reopen(t, keys, db, dir)
	table := openTable(t, db, "orders")
	full := someRows(60, 200)
	insert(t, table, full...)
	if got := rowsOf(t, table); !equalRows(got, append(want, full...)) {
		t.Error("the rows are not those inserted")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*.tmp-*")); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestCreateAndOpenRefuse(t *testing.T) {
	keys := newFakeKeys()
	db, dir := create(t, keys)
	if _, err := tde.Create(t.Context(), keys, dir, "other"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second database in one directory: %v", err)
	}
	if _, err := tde.Create(t.Context(), keys, t.TempDir(), "shop"); !errors.Is(err, api.ErrExists) {
		t.Errorf("a second database with one master key: %v", err)
	}
	if _, err := tde.Open(keys, dir); !errors.Is(err, tde.ErrInUse) {
		t.Errorf("opening it twice: %v", err)
	}
	if _, err := tde.Open(keys, t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opening an empty directory: %v", err)
	}
	createTable(t, db, "orders")
	if _, err := db.CreateTable(t.Context(), "orders"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second table of one name: %v", err)
	}
	for _, name := range []string{"", "../x", "A", "a.b", strings.Repeat("a", 65)} {
		if _, err := db.CreateTable(t.Context(), name); err == nil {
			t.Errorf("table %q was made", name)
		}
		if _, err := db.Table(t.Context(), name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("table %q: %v", name, err)
		}
	}
	db.Close()
	edit(t, dir, "database", func([]byte) []byte { return []byte("something else") })
	if _, err := tde.Open(keys, dir); !errors.Is(err, tde.ErrDamaged) {
		t.Errorf("opening a directory that is no database: %v", err)
	}
}

func TestRowsOfEverySizeUpToTheLimit(t *testing.T) {
	db, _ := create(t, newFakeKeys())
	table := createTable(t, db, "blobs")
	want := [][]byte{{}, {1}, bytes.Repeat([]byte{2}, tde.MaxRow), {}, bytes.Repeat([]byte{3}, tde.MaxRow-1)}
	ids := insert(t, table, want...)
	if got := rowsOf(t, table); !equalRows(got, want) {
		t.Errorf("%d rows came back, not those inserted", len(got))
	}
	if _, err := table.Insert(make([]byte, tde.MaxRow+1)); err == nil {
		t.Error("a row over the limit was inserted")
	}
	last := ids[len(ids)-1]
	for _, id := range []tde.RowID{{Page: last.Page + 1}, {Page: last.Page, Slot: last.Slot + 1}} {
		if _, err := table.Get(id); !errors.Is(err, tde.ErrNoRow) {
			t.Errorf("Get(%v): %v", id, err)
		}
	}
}

func TestManyUseOneTable(t *testing.T) {
	db, _ := create(t, newFakeKeys())
	createTable(t, db, "orders")
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			table, err := db.Table(t.Context(), "orders")
			if err != nil {
				t.Error(err)
				return
			}
			for j := range 25 {
				row := fmt.Appendf(nil, "%d/%d", i, j)
				ids, err := table.Insert(row)
				if err != nil {
					t.Error(err)
					return
				}
				if got, err := table.Get(ids[0]); err != nil || !bytes.Equal(got, row) {
					t.Errorf("Get = %q, %v; want %q", got, err, row)
				}
			}
			if _, err := db.Rekey(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := rowsOf(t, openTable(t, db, "orders")); len(got) != 100 {
		t.Errorf("%d rows, want 100", len(got))
	}
}
