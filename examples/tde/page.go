package tde

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
)

// A page on disk is one block:
//
//	   0    8  version    how often the page was written, from 1, big endian
//	   8   12  nonce      random, a fresh one for every write
//	  20 4060  ciphertext of the page
//	4080   16  tag        AES-256-GCM
//
// The tag also covers what the page is (its aad): the table's ID, the number of
// the page and its version. So a page that was moved, copied from another table, or
// given another version does not open. What a tag cannot show is that a whole block
// was put back as it was earlier.
//
// With random nonces one key may seal 2^32 pages (NIST SP 800-38D, section 8.3).
const (
	BlockSize = 4096 // bytes of a page on disk; what a disk writes at once

	versionSize = 8
	nonceSize   = 12
	tagSize     = 16
	pageSize    = BlockSize - versionSize - nonceSize - tagSize // in the clear

	// MaxRow is the longest row, in bytes: a row never spans pages.
	MaxRow = pageSize - usedSize - rowHeader
)

// KeySize is the length of a table key, in bytes: AES-256.
const KeySize = 32

// ErrDamaged says that something on disk is not what this package wrote there.
var ErrDamaged = errors.New("damaged or altered")

// sealer encrypts and decrypts the pages of one table. It may be used
// concurrently.
type sealer struct {
	aead  cipher.AEAD // makes and keeps the nonce by itself
	table tableID
}

// newSealer does not keep key; the caller wipes it.
func newSealer(key []byte, table tableID) (*sealer, error) {
	if len(key) != KeySize {
		return nil, fmt.Errorf("table key of %d bytes, want %d: %w", len(key), KeySize, ErrDamaged)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	return &sealer{aead: aead, table: table}, nil
}

// seal returns the page as a block for the disk.
func (s *sealer) seal(no uint32, p *page) []byte {
	out := make([]byte, versionSize, BlockSize)
	binary.BigEndian.PutUint64(out, p.version)
	return s.aead.Seal(out, nil, p.data[:], s.aad(no, p.version))
}

// open reads a block from the disk into p.
func (s *sealer) open(no uint32, block []byte, p *page) error {
	if len(block) != BlockSize {
		return fmt.Errorf("page %d has %d bytes, want %d: %w", no, len(block), BlockSize, ErrDamaged)
	}
	version := binary.BigEndian.Uint64(block)
	plain, err := s.aead.Open(p.data[:0], nil, block[versionSize:], s.aad(no, version))
	if err != nil || len(plain) != pageSize {
		return fmt.Errorf("page %d does not authenticate: %w", no, ErrDamaged)
	}
	p.version = version
	return p.check(no)
}

func (s *sealer) aad(no uint32, version uint64) []byte {
	aad := append([]byte("tde page v1\x00"), s.table[:]...)
	aad = binary.BigEndian.AppendUint32(aad, no)
	return binary.BigEndian.AppendUint64(aad, version)
}

// page is a page in the clear: two bytes that say how much is used, then the rows
// one after the other, each behind two bytes with its length.
type page struct {
	version uint64
	data    [pageSize]byte
}

const (
	usedSize  = 2
	rowHeader = 2
)

func (p *page) used() int { return usedSize + int(binary.BigEndian.Uint16(p.data[:])) }

// add appends a row if there is room for it.
func (p *page) add(row []byte) bool {
	at := p.used()
	if at+rowHeader+len(row) > pageSize {
		return false
	}
	binary.BigEndian.PutUint16(p.data[at:], uint16(len(row)))
	copy(p.data[at+rowHeader:], row)
	binary.BigEndian.PutUint16(p.data[:], uint16(at+rowHeader+len(row)-usedSize))
	return true
}

// rows calls yield with each row and its place until yield returns false. The
// row's bytes are the page's own.
func (p *page) rows(yield func(slot uint16, row []byte) bool) {
	end := p.used()
	var slot uint16
	for at := usedSize; at < end; slot++ {
		n := int(binary.BigEndian.Uint16(p.data[at:]))
		at += rowHeader
		if !yield(slot, p.data[at:at+n]) {
			return
		}
		at += n
	}
}

// count returns how many rows there are.
func (p *page) count() (n uint16) {
	for range p.rows {
		n++
	}
	return n
}

// check makes sure that the lengths within the page add up, so that nobody else
// has to.
func (p *page) check(no uint32) error {
	end := p.used()
	at := usedSize
	for at < end && at+rowHeader <= pageSize {
		at += rowHeader + int(binary.BigEndian.Uint16(p.data[at:]))
	}
	if end > pageSize || at != end {
		return fmt.Errorf("page %d has rows that do not add up: %w", no, ErrDamaged)
	}
	return nil
}
