package audit

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"
)

// Why says in what way a chain is broken.
type Why string

const (
	Altered   Why = "altered"   // the line does not match its hash or the record before it, or is no record
	Removed   Why = "removed"   // something is missing before the line
	Reordered Why = "reordered" // the record stands behind one that came later, or twice
	Cut       Why = "cut"       // the last line is not whole
)

// BrokenError names the first bad line.
type BrokenError struct {
	Line   int // from 1
	Why    Why
	Detail string
}

func (e *BrokenError) Error() string {
	return fmt.Sprintf("line %d: %s: %s", e.Line, e.Why, e.Detail)
}

// Report is what Verify has found, up to the first bad line if there is one.
type Report struct {
	Records    int       `json:"records"`
	First      uint64    `json:"first"` // number of the first record; above 1 the chain comes from another file
	Last       uint64    `json:"last"`
	Prev       string    `json:"prev"`       // hash of the record before the first; zeros when there is none
	Head       string    `json:"head"`       // hash of the last record; worth keeping elsewhere
	From       time.Time `json:"from"`       // of the first record
	To         time.Time `json:"to"`         // of the last one
	Recoveries int       `json:"recoveries"` // places where a line was cut and the log went on
	CutBytes   int64     `json:"cut_bytes"`  // in all of these places
}

// Verify reads a whole log. A broken chain is a *BrokenError. A log that is being
// written may end in a line that is not whole yet.
func Verify(r io.Reader) (Report, error) {
	v := verifier{in: bufio.NewReaderSize(r, 64<<10)}
	for {
		line, whole, err := v.readLine()
		switch {
		case errors.Is(err, io.EOF):
			return v.report, v.atEnd()
		case err != nil:
			return v.report, fmt.Errorf("reading line %d: %w", v.line+1, err)
		}
		v.line++
		if !whole {
			return v.report, v.broken(v.line, Cut, "it has no end; a crash cut it, or it is being written")
		}
		if err := v.take(line); err != nil {
			return v.report, err
		}
	}
}

type verifier struct {
	in     *bufio.Reader
	report Report
	line   int // the one that was read last, from 1
	head   head

	// cut are lines that are no records, until a record accounts for them; with
	// their ends. At most maxCut bytes.
	cut     []byte
	cutLine int // the first of them
}

// readLine returns the next line without its end, and whether it has one. A line
// over maxCut bytes comes in pieces, which is too much for what may be cut.
func (v *verifier) readLine() (line []byte, whole bool, err error) {
	for len(line) <= maxCut {
		part, err := v.in.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case err == nil:
			return line[:len(line)-1], true, nil
		case errors.Is(err, io.EOF) && len(line) > 0:
			return line, false, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, false, err
		}
	}
	return line, true, nil
}

// take goes on by one line.
func (v *verifier) take(line []byte) error {
	p, ok := parse(line)
	if !ok {
		if complete(line) {
			return v.broken(v.line, Altered, "it does not match its hash")
		}
		return v.keepCut(line)
	}
	if err := v.account(p); err != nil {
		return err
	}
	if err := v.follow(p); err != nil {
		return err
	}
	v.head = head{p.Seq, p.hash}
	v.report.Records++
	v.report.Last, v.report.Head, v.report.To = p.Seq, hex.EncodeToString(p.hash[:]), p.Time
	return nil
}

func (v *verifier) keepCut(line []byte) error {
	if len(v.cut) == 0 {
		v.cutLine = v.line
	}
	v.cut = append(append(v.cut, line...), '\n')
	if len(v.cut) > maxCut+1 {
		return v.broken(v.cutLine, Altered, "it is no record")
	}
	return nil
}

// account compares what was cut with what the record says about it.
func (v *verifier) account(p parsed) error {
	if len(v.cut) == 0 {
		if p.Event == eventRecovered {
			return v.broken(v.line, Removed, fmt.Sprintf("the %d bytes that it accounts for are missing", p.CutBytes))
		}
		return nil
	}
	bytes := v.cut[:len(v.cut)-1]
	sum := sha256.Sum256(bytes)
	if p.Event != eventRecovered || p.CutBytes != int64(len(bytes)) || p.CutSHA256 != hex.EncodeToString(sum[:]) {
		return v.broken(v.cutLine, Altered, "it is no record, and the next record does not account for it")
	}
	v.report.Recoveries++
	v.report.CutBytes += p.CutBytes
	v.cut = v.cut[:0]
	return nil
}

// follow compares a record with the one before it.
func (v *verifier) follow(p parsed) error {
	if v.report.Records == 0 {
		if p.Seq == 0 || p.Seq == 1 && p.prev != (head{}).hash {
			return v.broken(v.line, Altered, "it is the first record, but says that it follows another")
		}
		v.report.First, v.report.Prev, v.report.From = p.Seq, p.Prev, p.Time
		return nil
	}
	last := v.head.seq
	switch {
	case p.Seq <= last:
		return v.broken(v.line, Reordered, fmt.Sprintf("record %d stands behind record %d", p.Seq, last))
	case p.Seq > last+1:
		return v.broken(v.line, Removed, fmt.Sprintf("record %d stands behind record %d", p.Seq, last))
	case p.prev != v.head.hash:
		return v.broken(v.line, Altered, fmt.Sprintf("record %d does not follow record %d as it is here; one of the two was written anew", p.Seq, last))
	}
	return nil
}

func (v *verifier) atEnd() error {
	if len(v.cut) > 0 {
		return v.broken(v.cutLine, Altered, "it is no record")
	}
	return nil
}

func (v *verifier) broken(line int, why Why, detail string) error {
	return &BrokenError{Line: line, Why: why, Detail: detail}
}
