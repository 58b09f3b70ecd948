package main

import (
	"encoding/binary"

	"kmsd/pluginproto"
)

// What the two ends of a transfer say to each other is fields: each is its length as four
// bytes, most significant first, and its bytes. The engine has authenticated them, and what is
// in them is for the HSMs to judge; only their bounds are looked at here.

func pack(fields ...[]byte) []byte {
	size := 0
	for _, f := range fields {
		size += 4 + len(f)
	}
	out := make([]byte, 0, size)
	for _, f := range fields {
		out = binary.BigEndian.AppendUint32(out, uint32(len(f)))
		out = append(out, f...)
	}
	return out
}

// maxFields bounds what the other end may say: an object has two.
const maxFields = 2 * pluginproto.MaxCloneKeys

func unpack(b []byte) ([][]byte, error) {
	var fields [][]byte
	for len(b) > 0 {
		if len(b) < 4 || len(fields) == maxFields {
			return nil, unreadable()
		}
		n := binary.BigEndian.Uint32(b)
		if b = b[4:]; uint64(n) > uint64(len(b)) {
			return nil, unreadable()
		}
		fields = append(fields, b[:n:n])
		b = b[n:]
	}
	return fields, nil
}

// unpackN is unpack for a message of so many fields.
func unpackN(b []byte, n int) ([][]byte, error) {
	fields, err := unpack(b)
	if err == nil && len(fields) != n {
		err = unreadable()
	}
	return fields, err
}

func unreadable() error {
	return pluginproto.Errorf(pluginproto.ClassCaller, "reading what the other partition's driver says",
		"it is not what this protocol has at this place; do both members have the same version of kmsd-driver-luna?")
}

// number and numberOf are a step of a negotiation or a return value as a field.
func number(v uint) []byte { return binary.BigEndian.AppendUint64(nil, uint64(v)) }

func numberOf(f []byte) (uint, error) {
	if len(f) != 8 {
		return 0, unreadable()
	}
	return uint(binary.BigEndian.Uint64(f)), nil
}
