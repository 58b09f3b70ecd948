package tde

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"kmsd/kms/api"
)

const (
	databaseFile  = "database"
	databaseMagic = "kmsd example database v1\n"
	keySuffix     = ".key"
	pagesSuffix   = ".pages"
)

// ErrInUse says that another process has the database open.
var ErrInUse = errors.New("in use by another process")

// Database is an open database: a directory of tables and the name of the master
// key under which their keys are wrapped. Its methods may be called concurrently.
type Database struct {
	keys Keys
	dir  string
	name string   // of the database and of its master key
	lock *os.File // keeps other processes out while it is open

	mu     sync.Mutex        // guards tables; held while kmsd is asked for a key, so that no table is opened twice
	tables map[string]*Table // :: name → open table
}

// Create makes a database in dir, which must not hold one already, and its master
// key.
//
// A master key is made here and nowhere else. A database that made a new one
// whenever it could not find its old one would, on a bad day, turn an outage into
// the loss of its data.
func Create(ctx context.Context, keys Keys, dir, name string) (*Database, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("creating database %s: %w", name, err)
	}
	path := filepath.Join(dir, databaseFile)
	if _, err := os.Stat(path); err == nil {
		return nil, fmt.Errorf("creating database %s: %s: %w", name, dir, fs.ErrExist)
	}
	if _, err := keys.CreateMasterKey(ctx, name, api.KeyOptions{}); err != nil {
		return nil, fmt.Errorf("creating the master key of database %s: %w", name, err)
	}
	if err := replaceFile(path, []byte(databaseMagic+name+"\n")); err != nil {
		return nil, fmt.Errorf("creating database %s: %w", name, err)
	}
	return Open(keys, dir)
}

// Open opens the database in dir. It asks kmsd for nothing: each table's key is
// unwrapped when the table is first used.
func Open(keys Keys, dir string) (*Database, error) {
	path := filepath.Join(dir, databaseFile)
	b, err := readSmall(path, 1024)
	if err != nil {
		return nil, fmt.Errorf("opening database: %w", err)
	}
	name, ok := strings.CutPrefix(string(b), databaseMagic)
	name, end := strings.CutSuffix(name, "\n")
	if !ok || !end || name == "" {
		return nil, fmt.Errorf("opening database: %s: %w", path, ErrDamaged)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening database: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("opening database %s: %w", name, ErrInUse)
	}
	if err := removeTemp(dir); err != nil {
		f.Close()
		return nil, fmt.Errorf("opening database %s: %w", name, err)
	}
	return &Database{keys: keys, dir: dir, name: name, lock: f, tables: map[string]*Table{}}, nil
}

// Name returns the name of the database, which is its master key's as well.
func (d *Database) Name() string { return d.name }

// CreateTable makes a table with a key of its own. The name is 1 to 64 characters
// of a-z, 0-9 and _.
func (d *Database) CreateTable(ctx context.Context, name string) (_ *Table, err error) {
	if !validTable(name) {
		return nil, fmt.Errorf("creating table %q: the name must be 1 to 64 characters of a-z 0-9 _", name)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("creating table %s: %w", name, err)
		}
	}()
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := os.Stat(d.path(name, keySuffix)); err == nil {
		return nil, fs.ErrExist
	}
	id := newTableID()
	dk, err := d.keys.DataKey(ctx, d.name, KeySize, wrapContext(d.name, name, id))
	if err != nil {
		return nil, err
	}
	defer clear(dk.Plaintext)

	// The table exists as soon as it has a header, so that comes last.
	h := header{table: id, wrapped: dk.Wrapped}
	encoded, err := h.encode()
	if err != nil {
		return nil, err
	}
	if err := replaceFile(d.path(name, pagesSuffix), nil); err != nil {
		return nil, err
	}
	if err := replaceFile(d.path(name, keySuffix), encoded); err != nil {
		return nil, err
	}
	t, err := openTable(d.name, name, d.path(name, pagesSuffix), h, dk.Plaintext)
	if err != nil {
		return nil, err
	}
	d.tables[name] = t
	return t, nil
}

// Table opens a table, or returns it when it is open: kmsd unwraps its key once.
func (d *Database) Table(ctx context.Context, name string) (*Table, error) {
	if !validTable(name) {
		return nil, fmt.Errorf("opening table %q: %w", name, fs.ErrNotExist)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if t := d.tables[name]; t != nil {
		return t, nil
	}
	h, err := d.readHeader(name)
	if err != nil {
		return nil, fmt.Errorf("opening table %s: %w", name, err)
	}
	key, err := d.keys.Unwrap(ctx, d.name, h.wrapped, wrapContext(d.name, name, h.table))
	if err != nil {
		return nil, fmt.Errorf("opening table %s: unwrapping its key: %w", name, err)
	}
	defer clear(key)
	t, err := openTable(d.name, name, d.path(name, pagesSuffix), h, key)
	if err != nil {
		return nil, fmt.Errorf("opening table %s: %w", name, err)
	}
	d.tables[name] = t
	return t, nil
}

// Tables returns the names of all tables, in order.
func (d *Database) Tables() ([]string, error) {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return nil, fmt.Errorf("listing the tables of %s: %w", d.name, err)
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), keySuffix); ok && validTable(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Rekey makes a new version of the master key and wraps every table key with it.
// Pages stay as they are and tables stay in use. When it fails half way, Rewrap
// goes on.
func (d *Database) Rekey(ctx context.Context) (version int, err error) {
	version, err = d.keys.Rotate(ctx, d.name)
	if err != nil {
		return 0, fmt.Errorf("rotating the master key of %s: %w", d.name, err)
	}
	return version, d.Rewrap(ctx)
}

// Rewrap wraps every table key with the newest version of the master key. It tries
// all tables and reports all that failed. Those keep their older wrapped key, which
// is good as long as its version of the master key is.
func (d *Database) Rewrap(ctx context.Context) error {
	names, err := d.Tables()
	if err != nil {
		return err
	}
	var failed []error
	for _, name := range names {
		if err := d.rewrapTable(ctx, name); err != nil {
			failed = append(failed, fmt.Errorf("rewrapping the key of table %s: %w", name, err))
		}
	}
	return errors.Join(failed...)
}

func (d *Database) rewrapTable(ctx context.Context, name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	h, err := d.readHeader(name)
	if err != nil {
		return err
	}
	h.wrapped, err = d.keys.Rewrap(ctx, d.name, h.wrapped, wrapContext(d.name, name, h.table))
	if err != nil {
		return err
	}
	encoded, err := h.encode()
	if err != nil {
		return err
	}
	if err := replaceFile(d.path(name, keySuffix), encoded); err != nil {
		return err
	}
	if t := d.tables[name]; t != nil {
		t.setHeader(h)
	}
	return nil
}

// Close closes every table and lets go of the directory.
func (d *Database) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, t := range d.tables {
		errs = append(errs, t.close())
	}
	clear(d.tables)
	return errors.Join(append(errs, d.lock.Close())...)
}

func (d *Database) readHeader(table string) (header, error) {
	b, err := readSmall(d.path(table, keySuffix), int64(headerFixed+maxWrapped))
	if err != nil {
		return header{}, err
	}
	return parseHeader(b)
}

func (d *Database) path(table, suffix string) string { return filepath.Join(d.dir, table+suffix) }

func validTable(name string) bool {
	return 0 < len(name) && len(name) <= 64 &&
		strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789_") == ""
}
