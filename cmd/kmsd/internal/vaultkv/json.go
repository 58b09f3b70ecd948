package vaultkv

import (
	"bytes"
	"encoding/json"
	"errors"
	"unicode/utf8"
)

// maxDepth is how deep objects and arrays may be nested. Clients may read them by
// recursion.
const maxDepth = 64

var (
	errJSON   = errors.New("it is not JSON")
	errObject = errors.New("it is not a JSON object")
	errDepth  = errors.New("its JSON is nested too deep")
	errTwice  = errors.New("an object in it has the same field twice")
)

// member is a field of a JSON object: its name, and its value as it is written.
type member struct {
	name  string
	value []byte // a part of what was read, not a copy
}

// object returns the fields of a JSON object, in their order. It makes no copy of a
// value, which may be secret. What two readers could read in two ways is refused:
// fields given twice, at any depth, and what is not UTF-8.
func object(text []byte) ([]member, error) {
	if !utf8.Valid(text) || !json.Valid(text) {
		return nil, errJSON
	}
	s := scanner{text: text}
	s.space()
	if s.text[s.at] != '{' {
		return nil, errObject
	}
	var fields []member
	err := s.value(maxDepth, func(name string, value []byte) { fields = append(fields, member{name, value}) })
	return fields, err
}

// scanner walks through JSON that is known to be valid.
type scanner struct {
	text []byte
	at   int
}

func (s *scanner) space() {
	for s.at < len(s.text) && bytes.IndexByte([]byte(" \t\r\n"), s.text[s.at]) >= 0 {
		s.at++
	}
}

// value goes to the end of a value. see gets the fields of an object; nil: nobody does.
func (s *scanner) value(depth int, see func(name string, value []byte)) error {
	switch s.text[s.at] {
	case '{':
		return s.fields(depth, see)
	case '[':
		return s.elements(depth)
	case '"':
		s.quoted()
	default: // a number, true, false or null
		for s.at < len(s.text) && bytes.IndexByte([]byte(",]} \t\r\n"), s.text[s.at]) < 0 {
			s.at++
		}
	}
	return nil
}

func (s *scanner) fields(depth int, see func(name string, value []byte)) error {
	if depth == 0 {
		return errDepth
	}
	seen := make(map[string]bool)
	for s.open('}') {
		name, err := unquote(s.quoted())
		if err != nil {
			return err
		}
		if seen[name] {
			return errTwice
		}
		seen[name] = true
		s.space()
		s.at++ // the colon
		s.space()
		from := s.at
		if err := s.value(depth-1, nil); err != nil {
			return err
		}
		if see != nil {
			see(name, s.text[from:s.at])
		}
	}
	return nil
}

func (s *scanner) elements(depth int) error {
	if depth == 0 {
		return errDepth
	}
	for s.open(']') {
		if err := s.value(depth-1, nil); err != nil {
			return err
		}
	}
	return nil
}

// open goes over the bracket or comma before an element, and says whether there is one;
// if not, it goes over the closing bracket.
func (s *scanner) open(closing byte) bool {
	s.space()
	if s.text[s.at] == closing {
		s.at++
		return false
	}
	s.at++
	s.space()
	if s.text[s.at] == closing { // nothing between the brackets
		s.at++
		return false
	}
	return true
}

// quoted goes to the end of a string, and returns it with its quotes.
func (s *scanner) quoted() []byte {
	from := s.at
	for s.at++; s.text[s.at] != '"'; s.at++ {
		if s.text[s.at] == '\\' {
			s.at++
		}
	}
	s.at++
	return s.text[from:s.at]
}

// unquote reads a name, which is no secret.
func unquote(quoted []byte) (string, error) {
	var name string
	if err := json.Unmarshal(quoted, &name); err != nil {
		return "", errJSON
	}
	return name, nil
}
