package backup

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"

	"filippo.io/age"

	"kmsd/kms/catalog"
)

// Reader reads a backup and checks it on the way. It keeps no more in memory than
// master keys need. It may be used by one goroutine at a time.
type Reader struct {
	src      *bufio.Reader
	sum      hash.Hash
	ledger   *ledger
	lines    int
	contents Contents
	ended    error // what Next returns from now on
}

// NewReader opens a backup. ErrIdentity: none of the identities does. Every other fault
// of the file is ErrDamaged.
func NewReader(r io.Reader, identities ...age.Identity) (*Reader, error) {
	plain, err := age.Decrypt(r, identities...)
	if err != nil {
		if none := (*age.NoIdentityMatchError)(nil); errors.As(err, &none) {
			return nil, fmt.Errorf("opening the backup: %w", ErrIdentity)
		}
		return nil, fmt.Errorf("opening the backup: %w", damaged(err))
	}
	b := &Reader{src: bufio.NewReaderSize(plain, 64<<10), sum: sha256.New()}
	if err := b.readHeader(); err != nil {
		return nil, fmt.Errorf("opening the backup: %w", damaged(err))
	}
	return b, nil
}

// Header is what the backup says of itself.
func (b *Reader) Header() Header { return b.contents.Header }

// Contents are complete when Next has returned io.EOF.
func (b *Reader) Contents() Contents { return b.contents }

// Next returns the next record, as one of the types that catalog.Decode returns, or a
// [Blob]. io.EOF means that the backup is whole, and comes only then; before that,
// nothing that was read is certain.
func (b *Reader) Next() (any, error) {
	if b.ended != nil {
		return nil, b.ended
	}
	v, last, err := b.next()
	switch {
	case err != nil:
		b.ended = fmt.Errorf("reading line %d of the backup: %w", b.lines+1, damaged(err))
		return nil, b.ended
	case last:
		b.ended = io.EOF
		return nil, io.EOF
	}
	b.lines++
	return v, nil
}

// Verify reads a backup to its end. It proves no blob: that takes an HSM.
func Verify(r io.Reader, identities ...age.Identity) (Contents, error) {
	b, err := NewReader(r, identities...)
	if err != nil {
		return Contents{}, err
	}
	for {
		if _, err := b.Next(); errors.Is(err, io.EOF) {
			return b.Contents(), nil
		} else if err != nil {
			return Contents{}, err
		}
	}
}

func (b *Reader) readHeader() error {
	text, err := b.text()
	if err != nil {
		return err
	}
	// The version comes before the rest, so that a newer backup is refused for what it is.
	var head struct {
		Header struct {
			Format  string `json:"format"`
			Version int    `json:"version"`
		} `json:"header"`
	}
	if err := json.Unmarshal(text, &head); err != nil || head.Header.Format != format {
		return errors.New("it does not begin as one")
	}
	if v := head.Header.Version; v != formatVersion {
		return fmt.Errorf("it is of version %d, this kmsd knows version %d: use the kmsd that wrote it", v, formatVersion)
	}
	l, err := parse(text)
	if err != nil {
		return err
	}
	if b.ledger, err = newLedger(l.Header.Header); err != nil {
		return err
	}
	b.contents.Header = l.Header.Header
	b.sum.Write(text)
	b.lines++
	return nil
}

// next reads a line; after the last there is nothing.
func (b *Reader) next() (v any, last bool, err error) {
	text, err := b.text()
	if err != nil {
		return nil, false, err
	}
	l, err := parse(text)
	switch {
	case err != nil:
		return nil, false, err
	case l.Trailer != nil:
		return nil, true, b.end(*l.Trailer)
	case l.Blob != nil:
		v = *l.Blob
	case l.Record != nil:
		v, err = catalog.Decode(catalog.Record{Kind: l.Record.Kind, ID: string(l.Record.ID), Value: l.Record.Value})
	default:
		err = errors.New("a second header")
	}
	if err != nil {
		return nil, false, err
	}
	b.sum.Write(text)
	return v, false, b.ledger.put(v)
}

// end compares the trailer with what was read, and makes sure that nothing follows.
func (b *Reader) end(t trailerLine) error {
	counts, err := b.ledger.finish()
	if err != nil {
		return err
	}
	if t.Lines != b.lines || t.SHA256 != hex.EncodeToString(b.sum.Sum(nil)) || t.BackupReport != counts {
		return errors.New("it is not what was written: its check sum or its numbers are others")
	}
	switch _, err := b.src.ReadByte(); {
	case err == nil:
		return errors.New("something follows its end")
	case !errors.Is(err, io.EOF):
		return err
	}
	b.contents.BackupReport = counts
	return nil
}

// parse reads one line, which has exactly one of its fields.
func parse(text []byte) (l line, err error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&l); err != nil {
		return line{}, fmt.Errorf("it is no line of a backup: %w", err)
	}
	if rest, err := io.ReadAll(d.Buffered()); err != nil || string(rest) != "\n" {
		return line{}, errors.New("two things in one line")
	}
	fields := 0
	for _, has := range []bool{l.Header != nil, l.Record != nil, l.Blob != nil, l.Trailer != nil} {
		if has {
			fields++
		}
	}
	if fields != 1 {
		return line{}, fmt.Errorf("a line of %d things", fields)
	}
	return l, nil
}

// text reads the bytes of a line, with its line feed.
func (b *Reader) text() ([]byte, error) {
	var text []byte
	for {
		part, err := b.src.ReadSlice('\n')
		if len(text)+len(part) > maxLine {
			return nil, fmt.Errorf("a line of more than %d bytes", maxLine)
		}
		text = append(text, part...)
		switch {
		case err == nil:
			return text, nil
		case errors.Is(err, io.EOF):
			return nil, io.ErrUnexpectedEOF
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// damaged says of a fault that the backup is not whole. Its cause is only text: an
// io.EOF in it would pass for the end.
func damaged(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it is cut short", ErrDamaged)
	}
	return fmt.Errorf("%w: %v", ErrDamaged, err)
}
