package backup

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"

	"filippo.io/age"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
)

// Writer writes a backup. It keeps no more in memory than master keys need. It may be
// used by one goroutine at a time.
type Writer struct {
	age    io.WriteCloser
	buf    *bufio.Writer
	sum    hash.Hash
	ledger *ledger
	lines  int
	failed error // the first error, after which nothing is written
}

type recordLine struct {
	Kind  catalog.Kind    `json:"kind"`
	ID    []byte          `json:"id"` // of any value
	Value json.RawMessage `json:"value"`
}

// NewWriter begins a backup. What it has written to w is none before Close has
// returned without an error.
func NewWriter(w io.Writer, recipients []age.Recipient, h Header) (*Writer, error) {
	l, err := newLedger(h)
	if err != nil {
		return nil, fmt.Errorf("beginning a backup: %w", err)
	}
	sealed, err := age.Encrypt(w, recipients...)
	if err != nil {
		return nil, fmt.Errorf("beginning a backup: %w", err)
	}
	b := &Writer{age: sealed, buf: bufio.NewWriterSize(sealed, 64<<10), sum: sha256.New(), ledger: l}
	return b, b.write(line{Header: &headerLine{Format: format, Version: formatVersion, Header: h}})
}

// Put writes the next record, as one of the types that catalog.Encode takes, or [Blob].
// What does not belong with what was written is refused.
func (b *Writer) Put(v any) error {
	if b.failed != nil {
		return b.failed
	}
	if err := b.ledger.put(v); err != nil {
		return b.fail(err)
	}
	if blob, ok := v.(Blob); ok {
		return b.write(line{Blob: &blob})
	}
	r, err := catalog.Encode(v)
	if err != nil {
		return b.fail(err)
	}
	return b.write(line{Record: &recordLine{Kind: r.Kind, ID: []byte(r.ID), Value: r.Value}})
}

// Close ends the backup. When something is missing it is none.
func (b *Writer) Close() (api.BackupReport, error) {
	if b.failed != nil {
		return api.BackupReport{}, b.failed
	}
	counts, err := b.ledger.finish()
	if err != nil {
		return api.BackupReport{}, b.fail(err)
	}
	err = b.write(line{Trailer: &trailerLine{BackupReport: counts, Lines: b.lines, SHA256: hex.EncodeToString(b.sum.Sum(nil))}})
	if err == nil {
		err = errors.Join(b.buf.Flush(), b.age.Close())
	}
	if err != nil {
		return api.BackupReport{}, b.fail(err)
	}
	b.failed = errors.New("the backup is closed")
	return counts, nil
}

func (b *Writer) write(l line) error {
	text, err := json.Marshal(l)
	if err != nil {
		return b.fail(err)
	}
	text = append(text, '\n')
	if _, err := b.buf.Write(text); err != nil {
		return b.fail(err)
	}
	b.sum.Write(text) // never fails
	b.lines++
	return nil
}

func (b *Writer) fail(err error) error {
	b.failed = fmt.Errorf("writing a backup: %w", err)
	return b.failed
}
