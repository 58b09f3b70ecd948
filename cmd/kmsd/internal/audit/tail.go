package audit

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
)

// maxCut is how many bytes may stand behind the last whole record. A write is cut
// at most once a crash, and a line has less than maxLine bytes.
const maxCut = 1 << 20

// tail is how a log ends.
type tail struct {
	head     head // of the last whole record; zero when there is none
	noEnd    bool // that record lacks the end of its line
	cutBytes int64
	cutSum   [sha256.Size]byte // of these bytes
}

// readTail finds the last whole record, and what is behind it.
func readTail(r io.ReaderAt, size int64) (tail, error) {
	b := make([]byte, min(size, maxCut+maxLine))
	if n, err := r.ReadAt(b, size-int64(len(b))); n < len(b) {
		return tail{}, fmt.Errorf("reading its end: %w", err)
	}
	for end := len(b); ; {
		start := 1 + bytes.LastIndexByte(b[:end], '\n') // 0 when there is none
		line := b[start:end]
		if p, ok := parse(line); ok {
			return newTail(p, b[end:]), nil
		}
		if complete(line) {
			return tail{}, fmt.Errorf("one of its last lines was altered (%.40s...); see kmsd audit verify, then move the file away", line)
		}
		if start == 0 {
			break
		}
		end = start - 1
	}
	if size > int64(len(b)) || !bytes.HasPrefix(b, []byte(lineStart)[:min(len(lineStart), len(b))]) {
		return tail{}, errors.New("it is not an audit log of kmsd, or its end is damaged; move the file away")
	}
	return tail{cutBytes: int64(len(b)), cutSum: sha256.Sum256(b)}, nil
}

// newTail makes the tail after the last whole record from what is behind it, which
// begins with the end of its line, if that is there.
func newTail(last parsed, behind []byte) tail {
	t := tail{head: head{last.Seq, last.hash}}
	if len(behind) == 0 {
		t.noEnd = true
		return t
	}
	cut := behind[1:]
	t.cutBytes, t.cutSum = int64(len(cut)), sha256.Sum256(cut)
	return t
}
