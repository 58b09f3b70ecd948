package tde

import (
	"bytes"
	"errors"
	"testing"
)

func FuzzParseHeader(f *testing.F) {
	good, err := header{table: tableID{1}, wrapped: []byte("wrapped")}.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:headerFixed])
	f.Add([]byte(headerMagic))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHeader(b)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("an error that is not ErrDamaged: %v", err)
			}
			return
		}
		if again, err := h.encode(); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%x reads and writes as %x, %v", b, again, err)
		}
	})
}

// What is in a page is checked even though it has been authenticated: a fault of an
// older program may have written it.
func FuzzPageCheck(f *testing.F) {
	f.Add([]byte{0, 0})
	f.Add([]byte{0, 5, 0, 3, 'a', 'b', 'c'})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0, 4, 0, 3, 'a', 'b'})
	f.Fuzz(func(t *testing.T, b []byte) {
		var p page
		copy(p.data[:], b)
		if p.check(0) != nil {
			return
		}
		used := usedSize
		for _, row := range p.rows {
			used += rowHeader + len(row)
		}
		if used != p.used() {
			t.Fatalf("rows take %d bytes, the page says %d", used, p.used())
		}
	})
}
