package vaultkv

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"

	"kmsd/kms/api"
)

// parsePut reads {"options":{"cas":N},"data":{...}}. The plaintext is the caller's to
// wipe. Messages never say what a value is.
func parsePut(body []byte, m Mount) (api.NamedKeyPut, error) {
	fields, err := object(body)
	if err != nil {
		return api.NamedKeyPut{}, badRequest("the body is refused: %v; want {\"data\":{...}}", err)
	}
	var put api.NamedKeyPut
	var data []byte
	for _, f := range fields {
		switch f.name {
		case "data":
			data = f.value
		case "options":
			if put.CAS, err = parseCAS(f.value); err != nil {
				return api.NamedKeyPut{}, err
			}
		}
	}
	switch {
	case data == nil, string(data) == "null":
		return api.NamedKeyPut{}, badRequest("no data provided; want {\"data\":{...}}")
	case data[0] != '{':
		return api.NamedKeyPut{}, badRequest("data is not a JSON object")
	case m.Format == api.FormatMariaDB:
		put.Plaintext, err = parseMariaDB(data)
	default:
		put.Object = true
		put.Plaintext, err = compact(data)
	}
	return put, err
}

// parseCAS returns nil when it is not asked for.
func parseCAS(options []byte) (*int, error) {
	if string(options) == "null" {
		return nil, nil
	}
	fields, err := object(options)
	if err != nil {
		return nil, badRequest("options is refused: %v", err)
	}
	for _, f := range fields {
		if f.name == "cas" && string(f.value) != "null" {
			n, refused := number("options.cas", string(f.value))
			if refused != nil {
				return nil, refused
			}
			return &n, nil
		}
	}
	return nil, nil
}

// compact leaves out white space, and nothing else: numbers stay as they are written.
func compact(data []byte) ([]byte, error) {
	var out bytes.Buffer
	out.Grow(len(data)) // so that no copy is left behind
	if err := json.Compact(&out, data); err != nil {
		return nil, fmt.Errorf("leaving out white space: %w", err)
	}
	if out.Len() > api.MaxPlaintext {
		clear(out.Bytes())
		return nil, refuse(http.StatusRequestEntityTooLarge, api.CodeTooLarge, fmt.Sprintf("data is longer than %d bytes", api.MaxPlaintext))
	}
	return out.Bytes(), nil
}

// mariaDBWants says what MariaDB reads. With a key of another length mariadbd ends when it
// writes the first page, and at every start after that.
const mariaDBWants = `MariaDB reads keys here: data is {"data":"HEX"} with 32, 48 or 64 hexadecimal digits, which are 16, 24 or 32 bytes`

func parseMariaDB(data []byte) ([]byte, error) {
	fields, err := object(data)
	switch {
	case err != nil:
		return nil, badRequest("data is refused: %v", err)
	case len(fields) != 1 || fields[0].name != "data":
		return nil, badRequest("%s, and nothing else", mariaDBWants)
	case fields[0].value[0] != '"':
		return nil, badRequest("%s; this is not text", mariaDBWants)
	}
	digits := bytes.Trim(fields[0].value, `"`)
	key := make([]byte, hex.DecodedLen(len(digits)))
	if _, err := hex.Decode(key, digits); err != nil {
		clear(key)
		return nil, badRequest("%s; this is not hexadecimal", mariaDBWants)
	}
	if !api.MariaDBTakes(len(key)) {
		clear(key)
		return nil, badRequest("%s; these are %d bytes", mariaDBWants, len(key))
	}
	return key, nil
}

// writeValue writes what a client reads under data.data. The error is one of the
// mount's: it says that a value must not be given to its client.
func writeValue(to *bytes.Buffer, m Mount, nk api.NamedKey) error {
	to.Grow(2*len(nk.Plaintext) + 1024) // so that no copy is left behind
	switch {
	case m.Format != api.FormatMariaDB && nk.Object:
		to.Write(nk.Plaintext)
	case m.Format != api.FormatMariaDB:
		to.WriteString(`{"value":"`)
		to.Write(base64.StdEncoding.AppendEncode(to.AvailableBuffer(), nk.Plaintext))
		to.WriteString(`"}`)
	case nk.Object:
		return fmt.Errorf("version %d of data key %s is a JSON object and not a key for MariaDB", nk.Version, strconv.Quote(nk.ID))
	case !api.MariaDBTakes(len(nk.Plaintext)):
		return fmt.Errorf("version %d of data key %s has %d bytes; MariaDB takes 16, 24 or 32", nk.Version, strconv.Quote(nk.ID), len(nk.Plaintext))
	default:
		to.WriteString(`{"data":"`)
		to.Write(hex.AppendEncode(to.AvailableBuffer(), nk.Plaintext))
		to.WriteString(`"}`)
	}
	return nil
}
