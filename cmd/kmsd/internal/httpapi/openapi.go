package httpapi

import (
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"time"

	"kmsd/kms/api"
)

// object is a JSON object of the document. encoding/json sorts its members, so the
// document is the same every time.
type object = map[string]any

// describe writes the OpenAPI 3.1 document of the table. Paths, parameters and
// bodies come from the rows and from the Go types that the door encodes, so the
// document cannot describe another API than the one that is served.
func describe(rows []*route, public []publicRoute) ([]byte, error) {
	s := schemas{}
	paths := make(map[string]object)
	put := func(method, pattern string, op object) {
		if paths[pattern] == nil {
			paths[pattern] = make(object)
		}
		paths[pattern][strings.ToLower(method)] = op
	}
	for _, rt := range rows {
		put(rt.method, rt.pattern, s.operation(rt))
	}
	for _, rt := range public {
		put(http.MethodGet, rt.pattern, s.publicOperation(rt))
	}
	s.of(reflect.TypeFor[api.ErrorBody](), false)
	doc := object{
		"openapi": "3.1.0",
		"info": object{
			"title":       "kmsd",
			"version":     "1",
			"description": "Master keys in a group of HSMs. Bytes are standard base64. Every request may have " + api.RequestIDHeader + " and " + api.TimeoutHeader + "; every failure is an ErrorBody.",
		},
		"security": []object{{"token": []string{}}, {"certificate": []string{}}},
		"paths":    paths,
		"components": object{
			"schemas": s,
			"securitySchemes": object{
				"token":       object{"type": "http", "scheme": "bearer"},
				"certificate": object{"type": "mutualTLS"},
			},
			"responses": object{"error": object{
				"description": "The request failed. The status follows the code: " + statusTable() + ".",
				"content":     jsonContent(ref(reflect.TypeFor[api.ErrorBody]())),
			}},
		},
	}
	out, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("writing the OpenAPI document: %w", err)
	}
	return out, nil
}

func statusTable() string {
	var rows []string
	for _, c := range api.Codes() {
		rows = append(rows, fmt.Sprintf("%s %d", c, statusOf(c)))
	}
	return strings.Join(rows, ", ")
}

// schemas are the named types of the document.
type schemas map[string]object

func (s schemas) operation(rt *route) object {
	op := object{
		"operationId": operationID(rt.method, rt.pattern),
		"summary":     rt.summary,
		"description": "Action in policies: " + rt.action + "." + timeAllowed(rt),
		"responses":   object{"200": s.success(rt), "default": object{"$ref": "#/components/responses/error"}},
	}
	if params := parameters(rt); len(params) > 0 {
		op["parameters"] = params
	}
	if rt.request != reflect.TypeFor[none]() {
		op["requestBody"] = object{"required": !rt.optional, "content": jsonContent(s.of(rt.request, true))}
	}
	return op
}

// timeAllowed says how long a route takes when that is not what all take.
func timeAllowed(rt *route) string {
	switch rt.patience {
	case patient:
		return " It has 30 seconds, or as long as " + api.TimeoutHeader + " says."
	case endless:
		return " It has as long as " + api.TimeoutHeader + " says, else as long as the connection lasts."
	default:
		return ""
	}
}

func (s schemas) success(rt *route) object {
	if rt.answer == reflect.TypeFor[download]() {
		s.of(reflect.TypeFor[api.BackupReport](), false)
		return object{
			"description": "All of it was sent only if the trailer " + api.BackupReportHeader + " follows, a BackupReport; else the connection breaks.",
			"content":     object{"application/octet-stream": object{"schema": object{"type": "string", "format": "binary"}}},
		}
	}
	if !rt.stream {
		return object{"description": "Done.", "content": jsonContent(s.of(rt.answer, false))}
	}
	s.of(reflect.TypeFor[api.Event](), false)
	return object{
		"description": "Events, each an Event as JSON in data and its type in event; comments in between show that the stream lives.",
		"content":     object{"text/event-stream": object{"schema": object{"type": "string"}}},
	}
}

func (s schemas) publicOperation(rt publicRoute) object {
	var content object
	switch rt.answers {
	case nil:
		content = jsonContent(object{"type": "object"})
	case expositionType:
		content = object{"text/plain": object{"schema": text()}}
	default:
		content = jsonContent(s.of(rt.answers, false))
	}
	responses := object{"200": object{"description": "Yes.", "content": content}}
	if rt.answers == reflect.TypeFor[api.Readiness]() {
		responses["503"] = object{"description": "No.", "content": content}
	}
	return object{
		"operationId": operationID(http.MethodGet, rt.pattern),
		"summary":     rt.summary,
		"security":    []object{},
		"responses":   responses,
	}
}

func parameters(rt *route) []object {
	var list []object
	for _, segment := range strings.Split(rt.pattern, "/") {
		if name, ok := strings.CutPrefix(segment, "{"); ok {
			schema := text()
			name = strings.TrimSuffix(name, "}")
			p := object{"name": name, "in": "path", "required": true, "schema": schema}
			switch name {
			case "name", "db":
				schema["pattern"] = "^[A-Za-z0-9_][A-Za-z0-9._-]*$"
				schema["maxLength"] = api.MaxNameLen
			case "key":
				p["description"] = fmt.Sprintf("ID of a data key, 1 to %d bytes of any value, percent-encoded; \".\" and \"..\" as %%2E and %%2E%%2E.", api.MaxNamedKeyID)
			}
			list = append(list, p)
		}
	}
	for _, p := range rt.query {
		list = append(list, object{"name": p.name, "in": "query", "description": p.about, "schema": p.schema})
	}
	return list
}

// operationID makes postKeysNameWrap of POST /v1/keys/{name}/wrap.
func operationID(method, pattern string) string {
	id := strings.ToLower(method)
	for _, word := range strings.FieldsFunc(strings.TrimPrefix(pattern, "/v1"), func(c rune) bool { return strings.ContainsRune("/{}.-", c) }) {
		id += strings.ToUpper(word[:1]) + word[1:]
	}
	return id
}

func jsonContent(schema object) object { return object{"application/json": object{"schema": schema}} }

func ref(t reflect.Type) object { return object{"$ref": "#/components/schemas/" + schemaName(t)} }

func schemaName(t reflect.Type) string { return strings.ToUpper(t.Name()[:1]) + t.Name()[1:] }

// of is the schema of a type; a struct becomes a named one. In requests, fields
// that are not listed are refused, and so the schema is closed.
func (s schemas) of(t reflect.Type, request bool) object {
	switch {
	case t == reflect.TypeFor[time.Time]():
		return object{"type": "string", "format": "date-time"}
	case t == reflect.TypeFor[api.Duration]():
		return object{"type": "string", "description": "A Go duration, for example 720h."}
	case values(t) != nil:
		return object{"type": "string", "enum": values(t)}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return s.of(t.Elem(), request)
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return object{"type": "string", "contentEncoding": "base64"}
		}
		return object{"type": "array", "items": s.of(t.Elem(), request)}
	case reflect.Struct:
		return s.named(t, request)
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.String:
		return text()
	case reflect.Float64:
		return object{"type": "number"}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": s.of(t.Elem(), request)}
	default:
		return object{"type": "integer"}
	}
}

func (s schemas) named(t reflect.Type, request bool) object {
	if _, known := s[schemaName(t)]; known {
		return ref(t)
	}
	properties, required := make(object), []string{}
	o := object{"type": "object", "properties": properties}
	if request {
		o["additionalProperties"] = false
	}
	s[schemaName(t)] = o // before its fields, should a type hold itself
	for _, f := range fields(t) {
		schema := s.of(f.typ, request)
		if f.always {
			required = append(required, f.name)
			if f.typ.Kind() == reflect.Pointer && schema["type"] != nil {
				schema["type"] = []any{schema["type"], "null"}
			}
		}
		properties[f.name] = schema
	}
	slices.Sort(required)
	if len(required) > 0 {
		o["required"] = required
	}
	return ref(t)
}

// field is a member of a JSON object.
type field struct {
	name   string
	typ    reflect.Type
	always bool // never left out
}

// fields lists what encoding/json does with a struct, embedded ones included.
func fields(t reflect.Type) []field {
	var list []field
	for i := range t.NumField() {
		f := t.Field(i)
		tag := f.Tag.Get("json")
		switch {
		case f.Anonymous && tag == "":
			list = append(list, fields(f.Type)...)
		case f.IsExported() && tag != "-":
			name, options, _ := strings.Cut(tag, ",")
			list = append(list, field{name, f.Type, !strings.Contains(options, "omit")})
		}
	}
	return list
}

// values are those of a type whose set is closed; nil for any other.
func values(t reflect.Type) []string {
	switch t {
	case reflect.TypeFor[api.Code]():
		return texts(api.Codes()...)
	case reflect.TypeFor[api.State]():
		return texts(api.StateEnabled, api.StateDisabled, api.StateDestroyScheduled, api.StateDestroyed)
	case reflect.TypeFor[api.GroupState]():
		return texts(api.GroupNormal, api.GroupDegraded, api.GroupSole, api.GroupStandbyServing, api.GroupLost)
	case reflect.TypeFor[api.MemberState]():
		return texts(api.MemberActive, api.MemberStandby, api.MemberProbing, api.MemberSyncing, api.MemberDraining, api.MemberDown, api.MemberFailed)
	case reflect.TypeFor[api.JobState]():
		return texts(api.JobRunning, api.JobWaiting, api.JobDone, api.JobFailed)
	case reflect.TypeFor[api.Retire]():
		return texts(api.RetireNone, api.RetireDisable, api.RetireDestroy)
	default:
		return nil
	}
}

func texts[S ~string](list ...S) []string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = string(s)
	}
	return out
}
