package httpapi

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"kmsd/kms/api"
)

// none is the request of a route that takes no body. An empty body and {} are both
// none.
type none struct{}

// readBody reads at most limit bytes of r's body into buf.
func readBody(w http.ResponseWriter, r *http.Request, limit int64, buf *bytes.Buffer) error {
	if r.ContentLength > limit {
		return tooLarge(limit)
	}
	if r.ContentLength > 0 {
		buf.Grow(int(r.ContentLength) + bytes.MinRead)
	}
	_, err := buf.ReadFrom(http.MaxBytesReader(w, r.Body, limit))
	var over *http.MaxBytesError
	switch {
	case errors.As(err, &over):
		return tooLarge(limit)
	case err != nil:
		return api.NewError(api.CodeBadRequest, "the body ended too early", err)
	}
	return nil
}

func tooLarge(limit int64) error {
	return api.NewError(api.CodeTooLarge, fmt.Sprintf("the body is longer than %d bytes", limit), nil)
}

// decodeJSON reads one JSON value with known fields and nothing after it; no body at
// all is the zero value, where it is optional. Messages name fields and types but
// never values, which may be secret.
func decodeJSON[Req any](body []byte, optional bool) (Req, error) {
	var req Req
	if len(bytes.TrimSpace(body)) == 0 {
		if optional {
			return req, nil
		}
		return req, badRequest("the body is empty, want a JSON object")
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&req); err != nil {
		return req, badRequest(explain(err))
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return req, badRequest("the body goes on after its JSON object")
	}
	return req, nil
}

// explain says what is wrong with a body, in the words of its sender.
func explain(err error) string {
	var syntax *json.SyntaxError
	var wrong *json.UnmarshalTypeError
	var b64 base64.CorruptInputError
	const unknown = "json: unknown field "
	switch {
	case errors.As(err, &syntax):
		return fmt.Sprintf("the body is not JSON: byte %d is wrong", syntax.Offset)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "the body is not JSON: it ends too early"
	case errors.As(err, &wrong) && wrong.Field == "":
		return "the body is not a JSON object"
	case errors.As(err, &wrong):
		return fmt.Sprintf("field %q wants %s", clip(jsonPath(wrong.Field)), jsonKind(wrong.Type))
	case errors.As(err, &b64):
		return fmt.Sprintf("a field is not standard base64: its character %d is wrong", int64(b64))
	case strings.HasPrefix(err.Error(), unknown):
		return "unknown field " + clip(strings.TrimPrefix(err.Error(), unknown))
	default:
		return "a field has a value of the wrong form, for example a duration that is not like 720h"
	}
}

// params are the query parameters of a request.
type params struct{ values url.Values }

// parseQuery refuses parameters that the route does not know and those given twice:
// a misspelt one would silently mean its default.
func parseQuery(raw string, known []param) (params, error) {
	if raw == "" {
		return params{}, nil
	}
	values, err := url.ParseQuery(raw)
	if err != nil {
		return params{}, badRequest("the query is not well formed")
	}
	for name, v := range values {
		if !slices.ContainsFunc(known, func(p param) bool { return p.name == name }) {
			return params{}, badRequest(fmt.Sprintf("unknown parameter %q", clip(name)))
		}
		if len(v) > 1 {
			return params{}, badRequest(fmt.Sprintf("parameter %q is given more than once", name))
		}
	}
	return params{values: values}, nil
}

func (p params) text(name string) string { return p.values.Get(name) }

// number returns a parameter between 1 and most, or def when it is not given.
func (p params) number(name string, def, most int) (int, error) {
	s := p.values.Get(name)
	if s == "" {
		return def, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > most {
		return 0, badRequest(fmt.Sprintf("parameter %q wants a number from 1 to %d", name, most))
	}
	return n, nil
}

// duration returns a parameter that is a Go duration and not negative, or def when
// it is not given.
func (p params) duration(name string, def time.Duration) (time.Duration, error) {
	s := p.values.Get(name)
	if s == "" {
		return def, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, badRequest(fmt.Sprintf("parameter %q wants a duration like 720h", name))
	}
	return d, nil
}

// flag returns a parameter that is true or false; false when it is not given.
func (p params) flag(name string) (bool, error) {
	switch p.values.Get(name) {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	}
	return false, badRequest(fmt.Sprintf("parameter %q wants true or false", name))
}

// jsonPath is the path of a field as the sender knows it: encoding/json puts the names
// of embedded Go types into it, which begin with a capital as no field here does.
func jsonPath(path string) string {
	names := slices.DeleteFunc(strings.Split(path, "."), func(s string) bool { return s != "" && s[0] >= 'A' && s[0] <= 'Z' })
	return strings.Join(names, ".")
}

// jsonKind names what a Go type is in JSON.
func jsonKind(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int64, reflect.Uint64:
		return "a whole number"
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return "a base64 string"
		}
		return "a list"
	case reflect.Struct, reflect.Map:
		return "an object"
	default:
		return "a string"
	}
}
