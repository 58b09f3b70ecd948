package tde

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"
	"sync"
)

// RowID is the place of a row, as database engines use it.
type RowID struct {
	Page uint32
	Slot uint16
}

// ErrNoRow says that there is no row in that place.
var ErrNoRow = errors.New("no such row")

// Table is an open table. Its methods may be called concurrently. None of those
// that read and write rows asks kmsd for anything.
type Table struct {
	database, name string
	sealer         *sealer

	mu     sync.Mutex // guards all below; held while the file is read and written
	file   *os.File   // NAME.pages
	pages  uint32     // in the file
	tail   page       // the last page in the clear; rows are added to it
	header header
	failed error // of a write: what is on disk is not known any more, nothing is written until the table is opened again
}

// openTable does not keep key; the caller wipes it.
func openTable(database, name, path string, h header, key []byte) (_ *Table, err error) {
	s, err := newSealer(key, h.table)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	// Part of a block at the end is a page that was being added when the power went:
	// no Insert has returned for it, and the next one writes over it.
	t := &Table{database: database, name: name, sealer: s, file: f, header: h, pages: uint32(info.Size() / BlockSize)}
	if t.pages > 0 {
		if err := t.readLocked(t.pages-1, &t.tail); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// Name returns the table's name.
func (t *Table) Name() string { return t.name }

// Insert adds rows and returns when they are on disk. After an error some of the
// rows may be there.
func (t *Table) Insert(rows ...[]byte) ([]RowID, error) {
	for _, r := range rows {
		if len(r) > MaxRow {
			return nil, fmt.Errorf("inserting into %s: row of %d bytes, at most %d fit", t.name, len(r), MaxRow)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.failed != nil {
		return nil, fmt.Errorf("inserting into %s: an earlier write failed: %w", t.name, t.failed)
	}
	ids, err := t.insertLocked(rows)
	if err != nil {
		t.failed = err
		return nil, fmt.Errorf("inserting into %s: %w", t.name, err)
	}
	return ids, nil
}

func (t *Table) insertLocked(rows [][]byte) ([]RowID, error) {
	if t.pages == 0 && len(rows) > 0 {
		t.pages = 1
	}
	ids := make([]RowID, 0, len(rows))
	for _, r := range rows {
		if !t.tail.add(r) {
			if err := t.writeTailLocked(); err != nil {
				return nil, err
			}
			t.tail = page{}
			t.tail.add(r)
			t.pages++
		}
		ids = append(ids, RowID{Page: t.pages - 1, Slot: t.tail.count() - 1})
	}
	if len(rows) == 0 {
		return ids, nil
	}
	if err := t.writeTailLocked(); err != nil {
		return nil, err
	}
	return ids, t.file.Sync()
}

// writeTailLocked writes the last page as its next version.
func (t *Table) writeTailLocked() error {
	t.tail.version++
	_, err := t.file.WriteAt(t.sealer.seal(t.pages-1, &t.tail), int64(t.pages-1)*BlockSize)
	return err
}

func (t *Table) readLocked(no uint32, p *page) error {
	block := make([]byte, BlockSize)
	n, err := t.file.ReadAt(block, int64(no)*BlockSize)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("reading page %d of %s: %w", no, t.name, err)
	}
	if err := t.sealer.open(no, block[:n], p); err != nil {
		return fmt.Errorf("reading table %s: %w", t.name, err)
	}
	return nil
}

// page reads a page from the disk, past the copy in memory.
func (t *Table) page(no uint32) (*page, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if no >= t.pages {
		return nil, fmt.Errorf("page %d of table %s: %w", no, t.name, ErrNoRow)
	}
	p := new(page)
	return p, t.readLocked(no, p)
}

// Get reads one row from the disk.
func (t *Table) Get(id RowID) ([]byte, error) {
	p, err := t.page(id.Page)
	if err != nil {
		return nil, err
	}
	for slot, row := range p.rows {
		if slot == id.Slot {
			return row, nil
		}
	}
	return nil, fmt.Errorf("page %d of table %s has no slot %d: %w", id.Page, t.name, id.Slot, ErrNoRow)
}

// Rows reads every row from the disk, in the order in which they were inserted. It
// ends with the first error.
func (t *Table) Rows() iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for no := range t.Pages() {
			p, err := t.page(no)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, row := range p.rows {
				if !yield(row, nil) {
					return
				}
			}
		}
	}
}

// Pages returns how many pages the table has.
func (t *Table) Pages() uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pages
}

// Envelope returns the wrapped table key as it is on disk, and the aad with which
// kmsd unwraps it.
func (t *Table) Envelope() (wrapped, aad []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.header.wrapped), wrapContext(t.database, t.name, t.header.table)
}

func (t *Table) setHeader(h header) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.header = h
}

func (t *Table) close() error { return t.file.Close() }
