package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"kmsd/examples/tde"
	"kmsd/kms/api"
)

// marker is in every row, so that one search shows whether rows are readable on
// disk.
const marker = "CLEARTEXT-MARKER"

// database is a database of the demo together with what should be in it.
type database struct {
	name, dir string
	db        *tde.Database
	tables    []*table
}

// table has one writer. Row n is always the same bytes, so the count of rows is all
// that has to be remembered to check them.
type table struct {
	database, name string
	t              *tde.Table

	mu   sync.Mutex // guards rows, last
	rows int        // acknowledged
	last tde.RowID  // of the newest row
}

// createDatabase makes a database and its tables, and a first row in each.
func createDatabase(ctx context.Context, l *load, svc api.Service, root, name string, tables ...string) (*database, error) {
	d := &database{name: name, dir: filepath.Join(root, name)}
	err := l.do(kindMake, "create master key", func() (err error) {
		d.db, err = tde.Create(ctx, svc, d.dir, name)
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, tableName := range tables {
		t := &table{database: name, name: tableName}
		err := l.do(kindKey, "create table", func() (err error) {
			t.t, err = d.db.CreateTable(ctx, tableName)
			return err
		})
		if err == nil {
			err = t.insert(10)
		}
		if err != nil {
			return d, errors.Join(err, d.db.Close())
		}
		d.tables = append(d.tables, t)
	}
	return d, nil
}

func (t *table) row(n int) []byte {
	return fmt.Appendf(nil, "%s %s.%s row %07d %s", marker, t.database, t.name, n, bytes.Repeat([]byte{'.'}, n%90))
}

// insert adds the next n rows.
func (t *table) insert(n int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	rows := make([][]byte, n)
	for i := range rows {
		rows[i] = t.row(t.rows + i)
	}
	ids, err := t.t.Insert(rows...)
	if err != nil {
		return err
	}
	t.rows += n
	t.last = ids[n-1]
	return nil
}

// readLast reads the newest row back.
func (t *table) readLast() error {
	t.mu.Lock()
	id, want := t.last, t.row(t.rows-1)
	t.mu.Unlock()
	got, err := t.t.Get(id)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("row %v of %s.%s is not what was inserted", id, t.database, t.name)
	}
	return err
}

// write adds rows and reads them in the background.
func (t *table) write(l *load) {
	l.every(25*time.Millisecond, func(context.Context) {
		l.do(kindPage, "insert rows", func() error { return t.insert(3) })
		l.do(kindPage, "read row", t.readLast)
	})
}

// reopen opens the database and its tables anew, as after a restart.
func (d *database) reopen(ctx context.Context, l *load, svc api.Service) error {
	var err error
	if d.db, err = tde.Open(svc, d.dir); err != nil {
		return err
	}
	for _, t := range d.tables {
		err := l.do(kindKey, "open table", func() (err error) {
			t.t, err = d.db.Table(ctx, t.name)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// verify reads every row of the table and compares it.
func (t *table) verify() error {
	n := 0
	for row, err := range t.t.Rows() {
		if err != nil {
			return err
		}
		if !bytes.Equal(row, t.row(n)) {
			return fmt.Errorf("row %d of %s.%s is not what was inserted", n, t.database, t.name)
		}
		n++
	}
	if n != t.rows {
		return fmt.Errorf("%s.%s has %d rows; %d were acknowledged", t.database, t.name, n, t.rows)
	}
	return nil
}
