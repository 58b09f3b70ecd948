package catalog

import (
	"bytes"
	"encoding/base64"
	"time"
)

// A rekey and the search for data keys that need a version read millions of records, and
// encoding/json takes five times as long as all the rest. scanner reads such a record if
// it is exactly as encode writes it; anything else is left to decode, which knows what is
// wrong with it.
type scanner struct {
	rest []byte
	bad  bool
}

// scanDataKey reads the value of a data key, except for what is in its ID.
func scanDataKey(value []byte, dk *DataKey) bool {
	s := scanner{rest: value}
	s.need(`{"schema":1,"first":`)
	dk.First = s.time()
	s.need(`,`)
	s.version(&dk.DataVersion)
	return !s.bad && len(s.rest) == 0
}

// scanOldVersion reads the value of an older version of a data key.
func scanOldVersion(value []byte, old *OldVersion) bool {
	s := scanner{rest: value}
	s.need(`{"schema":1,`)
	s.version(&old.DataVersion)
	return !s.bad && len(s.rest) == 0
}

func (s *scanner) version(v *DataVersion) {
	s.need(`"version":`)
	v.Number = s.number()
	s.need(`,"created":`)
	v.Created = s.time()
	v.Object = s.has(`,"object":true`)
	if s.has(`,"deleted":`) {
		at := s.time()
		v.Deleted = &at
	}
	s.need(`,"master":`)
	v.Master = s.number()
	s.need(`,"envelope":`)
	v.Envelope = s.bytes()
	s.need(`}`)
}

// has takes text if it comes next.
func (s *scanner) has(text string) bool {
	if len(s.rest) < len(text) || string(s.rest[:len(text)]) != text {
		return false
	}
	s.rest = s.rest[len(text):]
	return true
}

func (s *scanner) need(text string) {
	if !s.has(text) {
		s.bad = true
	}
}

// number takes a number of at most nine digits that is not zero.
func (s *scanner) number() (n int) {
	digits := 0
	for digits < len(s.rest) && '0' <= s.rest[digits] && s.rest[digits] <= '9' {
		digits++
	}
	if digits == 0 || digits > 9 || s.rest[0] == '0' {
		s.bad = true
		return 0
	}
	for _, d := range s.rest[:digits] {
		n = 10*n + int(d-'0')
	}
	s.rest = s.rest[digits:]
	return n
}

// text takes what stands between two quotes. What a backslash begins is for others.
func (s *scanner) text() []byte {
	if !s.has(`"`) {
		s.bad = true
		return nil
	}
	end := bytes.IndexByte(s.rest, '"')
	if end < 0 {
		s.bad = true
		return nil
	}
	text := s.rest[:end]
	s.rest = s.rest[end+1:]
	return text
}

func (s *scanner) time() (t time.Time) {
	if text := s.text(); t.UnmarshalText(text) != nil {
		s.bad = true
	}
	return t
}

func (s *scanner) bytes() []byte {
	text := s.text()
	b, err := base64.StdEncoding.AppendDecode([]byte{}, text)
	if err != nil || base64.StdEncoding.EncodedLen(len(b)) != len(text) { // it passes over line feeds
		s.bad = true
	}
	return b
}
