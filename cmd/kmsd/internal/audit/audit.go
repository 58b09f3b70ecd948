// Package audit answers: who did what, and how did it end?
//
// The audit log is a file of JSON lines. Each [Record] stands in one line with its
// number (seq), the hash of the record before it (prev) and its own (hash): the
// SHA-256 of the line without the field "hash". So a record that is altered, taken
// out or moved breaks the chain, and [Verify] names the place. What a chain cannot
// show by itself is that whole lines are missing at the end, or that everything
// was written anew: for that, keep seq and hash of the last record (the Head of a
// [Report]) somewhere else from time to time.
//
// The log fails closed: Write returns an error unless the whole line was taken by
// the kernel, and a request whose record is not written must not be answered. So a
// killed process loses nothing. Against a power cut, a goroutine calls fsync once a
// second and Close does; at most the last second is lost.
//
// A line that was cut by a crash or a full disk is never removed. The next record
// says how many bytes there are and their SHA-256, and Verify accepts exactly these
// ("recovered"). A line that is whole but does not match its hash was altered and is
// never covered in this way; a log that ends in one is not opened.
//
// After a rotation the chain goes on in the new file: its first record follows the
// last one of the old file. A kmsd that starts on an empty file begins a new chain
// at 1.
//
// No plaintext, PIN, token or key gets in: a Record has no field for them.
package audit

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"kmsd/cmd/kmsd/internal/owned"
)

// syncInterval is how often the log is forced to the disk, if there is news.
const syncInterval = time.Second

// ErrInUse: another process writes this log.
var ErrInUse = errors.New("another process writes this audit log")

// Record is what is remembered about one request. Empty fields are left out.
type Record struct {
	Time          time.Time // when the request came; zero means now
	RequestID     string
	Principal     string // "" when nobody was recognised
	Remote        string // address of the client, or "unix:UID"
	Action        string
	Operation     string // what was done under an action that allows several; "" for the others
	Group         string
	Key           string // name
	Database      string // whose data keys it was about, a well-formed name, or ""
	NamedKey      string // ID of a data key, any bytes; "" when there were several or none
	Job           string // ID of the job that was asked about or begun; "" when there was none
	Member        string
	Version       int    // of the key that was used; 0 when there were several or none
	Items         int    // in a batch; 0 when it was none
	Failed        int    // items of the batch that failed
	AllowDegraded bool   // fewer copies than min_copies were asked for
	Force         bool   // a member was to go although it was the last
	Adopt         bool   // unknown objects of a token were to become keys
	Spec          string // how a member was described; "" when it was not
	Suppressed    int    // requests without a principal that have no record of their own
	Outcome       string // "ok", or the code of the error
	Duration      time.Duration
}

// Log is an open audit log. All methods may be called concurrently.
type Log struct {
	path string

	// syncing is held while the file is forced to the disk, exchanged or closed, so
	// that Write does not wait for a disk. It is taken before mu.
	syncing sync.Mutex

	mu    sync.Mutex // guards what follows
	file  *os.File   // nil: closed
	head  head       // of the last whole record
	buf   []byte     // of the line that is being made
	cut   bool       // a write failed: the file may end in a part of a line
	dirty bool       // written since the last fsync
	lost  error      // fsync has failed: nobody knows what is on the disk

	stop   chan struct{} // ends the goroutine that calls fsync
	ticker sync.WaitGroup
}

// head is the end of a chain. The zero value is its beginning.
type head struct {
	seq  uint64
	hash [hashSize]byte
}

// Open opens the log at path, or makes it with mode 0600, and goes on with its
// chain. The file is locked: a second process gets ErrInUse.
func Open(path string) (_ *Log, err error) {
	l := &Log{path: path, stop: make(chan struct{})}
	defer func() {
		if err != nil {
			err = fmt.Errorf("opening audit log %s: %w", path, err)
		}
	}()
	f, err := openFile(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	l.file = f
	if err := l.recoverLocked(); err != nil {
		return nil, err
	}
	l.ticker.Go(l.syncNowAndThen)
	return l, nil
}

func openFile(path string) (_ *os.File, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("it is not a regular file")
	case !owned.ByUs(info):
		return nil, fmt.Errorf("it belongs to another user, who could alter it (%s)", owned.Advice(info))
	case info.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("its mode is %04o, but nobody but its owner may write it (chmod go-w)", info.Mode().Perm())
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, ErrInUse
		}
		return nil, fmt.Errorf("locking it: %w", err)
	}
	if info.Size() > 0 {
		return f, nil
	}
	return f, syncFolder(filepath.Dir(path)) // the name of a new file has to last too
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Write appends a record. When it returns nil the record survives the end of this
// process. After an error the record must be counted as not written.
func (l *Log) Write(r Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.writeLocked(r); err != nil {
		return fmt.Errorf("writing audit log %s: %w", l.path, err)
	}
	return nil
}

func (l *Log) writeLocked(r Record) error {
	switch {
	case l.file == nil:
		return os.ErrClosed
	case l.lost != nil:
		return fmt.Errorf("it is not known what is on the disk; give it a new file: %w", l.lost)
	}
	if l.cut {
		if err := l.recoverLocked(); err != nil {
			return err
		}
	}
	if r.Time.IsZero() {
		r.Time = time.Now()
	}
	return l.appendLocked(nil, func(b []byte) []byte { return appendRecord(b, r) })
}

// appendLocked writes before and then a line with the given fields in one write(2).
func (l *Log) appendLocked(before []byte, fields func([]byte) []byte) error {
	next := head{seq: l.head.seq + 1}
	start := len(before)
	l.buf = append(l.buf[:0], before...)
	l.buf = appendStart(l.buf, next.seq)
	l.buf = fields(l.buf)
	l.buf, next.hash = appendEnd(l.buf, start, l.head.hash)
	if _, err := l.file.Write(l.buf); err != nil {
		l.cut = true // perhaps a part of it was written
		return err
	}
	l.head, l.dirty = next, true
	return nil
}

// recoverLocked finds the end of the chain in the file. If there is something
// behind it, it says so in the file.
func (l *Log) recoverLocked() error {
	info, err := l.file.Stat()
	if err != nil {
		return err
	}
	t, err := readTail(l.file, info.Size())
	if err != nil {
		return err
	}
	if t.head != (head{}) { // else the chain goes on from another file
		if t.head.seq < l.head.seq {
			return fmt.Errorf("it ends at record %d, but record %d was written", t.head.seq, l.head.seq)
		}
		l.head = t.head
	}
	if t.noEnd {
		if _, err := l.file.Write([]byte("\n")); err != nil {
			return fmt.Errorf("ending a line that was cut: %w", err)
		}
	}
	if t.cutBytes > 0 {
		now := time.Now()
		err := l.appendLocked([]byte("\n"), func(b []byte) []byte { return appendRecovered(b, now, t) })
		if err != nil {
			return fmt.Errorf("going on after a line that was cut: %w", err)
		}
	}
	l.cut = false
	return nil
}

// Reopen goes on in a new file at the same path, after somebody moved the old one
// away. When the file is still the same nothing happens. On an error the log goes
// on in the old file.
func (l *Log) Reopen() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	if err := l.reopen(); err != nil {
		return fmt.Errorf("reopening audit log %s: %w", l.path, err)
	}
	return nil
}

func (l *Log) reopen() (err error) {
	same, err := l.isSame()
	if err != nil || same {
		return err
	}
	f, err := openFile(l.path)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && info.Size() > 0 {
		err = errors.New("there are records in it already")
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.mu.Lock()
	old := l.file
	l.file, l.cut, l.dirty, l.lost = f, false, false, nil
	l.mu.Unlock()
	if err := errors.Join(old.Sync(), old.Close()); err != nil {
		return fmt.Errorf("closing the old file: %w", err)
	}
	return nil
}

// isSame says whether the file at the path is the one that is open.
func (l *Log) isSame() (bool, error) {
	l.mu.Lock()
	f := l.file
	l.mu.Unlock()
	if f == nil {
		return false, os.ErrClosed
	}
	mine, err := f.Stat()
	if err != nil {
		return false, err
	}
	there, err := os.Stat(l.path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(mine, there), err
}

// Sync forces what is written to the disk.
func (l *Log) Sync() error {
	l.syncing.Lock()
	defer l.syncing.Unlock()
	return l.sync()
}

// sync must be called with syncing held, so that nobody closes the file meanwhile.
func (l *Log) sync() error {
	l.mu.Lock()
	f, dirty := l.file, l.dirty
	l.dirty = false
	l.mu.Unlock()
	if f == nil || !dirty {
		return nil
	}
	err := f.Sync()
	if err != nil {
		// The kernel may have dropped what it could not write, and the next fsync
		// would say that all is well.
		l.mu.Lock()
		l.lost = err
		l.mu.Unlock()
	}
	return err
}

func (l *Log) syncNowAndThen() {
	t := time.NewTicker(syncInterval)
	defer t.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-t.C:
			_ = l.Sync() // the next Write says so
		}
	}
}

// Close forces the log to the disk and closes it.
func (l *Log) Close() error {
	defer l.ticker.Wait() // without syncing, which it may wait for
	l.syncing.Lock()
	defer l.syncing.Unlock()
	err := l.sync()
	l.mu.Lock()
	f := l.file
	l.file = nil
	l.mu.Unlock()
	if f == nil {
		return nil
	}
	close(l.stop)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("closing audit log %s: %w", l.path, err)
	}
	return nil
}
