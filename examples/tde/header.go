package tde

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
)

// The header of a table, NAME.key:
//
//	0   4  magic "TDE1"
//	4  16  table ID, random
//	20  2  length of the wrapped table key, big endian
//	22  n  wrapped table key, an envelope of kmsd
//
// kmsd authenticates the envelope together with its context (wrapContext), so a
// header that was copied from another table or another database does not unwrap.
const (
	headerMagic = "TDE1"
	headerFixed = len(headerMagic) + len(tableID{}) + 2
	maxWrapped  = 1024 // bytes; a wrapped 32-byte key has less than 100
)

type tableID [16]byte

type header struct {
	table   tableID
	wrapped []byte
}

func newTableID() (id tableID) {
	rand.Read(id[:]) // never fails: see crypto/rand
	return id
}

func (h header) encode() ([]byte, error) {
	if len(h.wrapped) == 0 || len(h.wrapped) > maxWrapped {
		return nil, fmt.Errorf("wrapped table key of %d bytes, want 1 to %d", len(h.wrapped), maxWrapped)
	}
	b := append([]byte(headerMagic), h.table[:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(h.wrapped)))
	return append(b, h.wrapped...), nil
}

func parseHeader(b []byte) (header, error) {
	if len(b) < headerFixed || string(b[:len(headerMagic)]) != headerMagic {
		return header{}, fmt.Errorf("not the header of a table: %w", ErrDamaged)
	}
	var h header
	copy(h.table[:], b[len(headerMagic):])
	n := int(binary.BigEndian.Uint16(b[headerFixed-2:]))
	if n == 0 || n > maxWrapped || len(b) != headerFixed+n {
		return header{}, fmt.Errorf("header of %d bytes with a wrapped key of %d: %w", len(b), n, ErrDamaged)
	}
	h.wrapped = append([]byte(nil), b[headerFixed:]...)
	return h, nil
}

// wrapContext is the aad of a table key: it says what the key is for.
func wrapContext(database, table string, id tableID) []byte {
	return fmt.Appendf(nil, "tde table key v1\x00%s\x00%s\x00%x", database, table, id)
}
