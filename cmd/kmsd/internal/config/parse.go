package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// maxFile bounds a configuration file, in bytes.
const maxFile = 1 << 20

var durationType = reflect.TypeFor[time.Duration]()

// parse reads YAML into plain values of the types that Config wants, noting the
// line of each. It knows the keys from the types, so that nothing has to be
// listed twice. What does not fit becomes a fault and is left out.
func (c *collector) parse(text []byte) map[string]any {
	if len(text) > maxFile {
		c.add("", "longer than %d bytes", maxFile)
		return nil
	}
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		c.add("", "empty; see the example in the documentation")
		return nil
	} else if err != nil {
		c.syntax(err)
		return nil
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		c.add("", "more than one YAML document; keep one")
		return nil
	}
	v, _ := c.value(doc.Content[0], reflect.TypeFor[Config](), "").(map[string]any)
	return v
}

// syntaxLine finds the line in the messages of the YAML parser, which has no type
// for it.
var syntaxLine = regexp.MustCompile(`^yaml: line (\d+): `)

func (c *collector) syntax(err error) {
	msg := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 1
	if m := syntaxLine.FindStringSubmatch(err.Error()); m != nil {
		line, _ = strconv.Atoi(m[1]) // the pattern admits digits only; an overflow leaves the largest number
		msg = err.Error()[len(m[0]):]
	}
	c.faults = append(c.faults, Fault{Origin: fmt.Sprintf("%s:%d", c.file, line), Msg: "not YAML: " + msg, line: line})
}

// value turns a node into a value for type t, nil when there is none.
func (c *collector) value(n *yaml.Node, t reflect.Type, path string) any {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if path != "" {
		c.note(path, origin{line: n.Line})
	}
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		c.add(path, "anchors and aliases are not understood here; write it out")
		return nil
	case n.Kind == yaml.ScalarNode && n.Tag == "!!null":
		return nil
	case t.Kind() == reflect.Struct || t.Kind() == reflect.Map:
		return c.mapping(n, t, path)
	case t.Kind() == reflect.Slice:
		return c.sequence(n, t, path)
	case n.Kind != yaml.ScalarNode:
		c.add(path, "want %s, not a %s", typeName(t), nodeName(n))
		return nil
	}
	v, err := scalar(n.Value, t)
	if err != nil {
		c.add(path, "%v", err)
		return nil
	}
	return v
}

func (c *collector) mapping(n *yaml.Node, t reflect.Type, path string) any {
	if n.Kind != yaml.MappingNode {
		c.add(path, "want %s, not a %s", typeName(t), nodeName(n))
		return nil
	}
	out := map[string]any{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], n.Content[i+1]
		at := join(path, key.Value)
		seen := slices.ContainsFunc(n.Content[:i], func(k *yaml.Node) bool { return k.Line < key.Line && k.Value == key.Value })
		elem, known := keyType(t, key.Value)
		switch {
		case key.Kind != yaml.ScalarNode:
			c.note(at, origin{line: key.Line})
			c.add(at, "a key must be text")
		case !known:
			// Noted at the key: what is in it is not looked at.
			c.note(at, origin{line: key.Line})
			c.add(at, "unknown key%s", suggest(key.Value, t))
		case seen && out[key.Value] != nil:
			c.note(at, origin{line: key.Line})
			c.add(at, "given twice")
		default:
			v := c.value(val, elem, at)
			if v == nil && t.Kind() == reflect.Map && elem.Kind() == reflect.Struct {
				v = map[string]any{} // its name alone says that it is meant to be there
			}
			if v != nil {
				out[key.Value] = v
			}
			// An empty or nested value is best looked for at its key.
			c.note(at, origin{line: key.Line})
		}
	}
	return out
}

func (c *collector) sequence(n *yaml.Node, t reflect.Type, path string) any {
	if n.Kind != yaml.SequenceNode {
		c.add(path, "want %s, not a %s", typeName(t), nodeName(n))
		return nil
	}
	var out []any
	for i, e := range n.Content {
		// An element that is bad keeps its place, so that later ones keep their
		// number.
		v := c.value(e, t.Elem(), fmt.Sprintf("%s[%d]", path, i))
		if v == nil {
			v = reflect.Zero(t.Elem()).Interface()
		}
		out = append(out, v)
	}
	return out
}

// scalar reads text as a value of type t.
func scalar(text string, t reflect.Type) (any, error) {
	switch {
	case t == durationType:
		d, err := time.ParseDuration(text)
		if err != nil {
			return nil, fmt.Errorf("%q is not a duration; write a number with a unit, as in 500ms, 20s or 5m", text)
		}
		return d, nil
	case t.Kind() == reflect.Bool:
		switch text {
		case "true", "false":
			return text == "true", nil
		}
		return nil, fmt.Errorf("%q is neither true nor false", text)
	case t.Kind() == reflect.Int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return nil, fmt.Errorf("%q is not a whole number", text)
		}
		return n, nil
	default:
		return text, nil
	}
}

// keyType returns the type of what key holds in a value of type t.
func keyType(t reflect.Type, key string) (reflect.Type, bool) {
	if t.Kind() == reflect.Map {
		return t.Elem(), true
	}
	for f := range fields(t) {
		if f.Tag.Get("koanf") == key {
			return f.Type, true
		}
	}
	return nil, false
}

// fields yields the fields of a struct that have a key.
func fields(t reflect.Type) func(yield func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		for i := range t.NumField() {
			f := t.Field(i)
			if key := f.Tag.Get("koanf"); key != "" && key != "-" && !yield(f) {
				return
			}
		}
	}
}

// suggest names the key that was probably meant, or those that there are.
func suggest(key string, t reflect.Type) string {
	var known []string
	for f := range fields(t) {
		k := f.Tag.Get("koanf")
		if distance(key, k) <= 2 {
			return "; did you mean " + k + "?"
		}
		known = append(known, k)
	}
	return "; known here: " + strings.Join(known, ", ")
}

// distance is the Levenshtein distance. Long keys, which nobody meant, are far
// from everything.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func typeName(t reflect.Type) string {
	switch {
	case t == durationType:
		return "a duration"
	case t.Kind() == reflect.Struct, t.Kind() == reflect.Map:
		return "a mapping (key: value)"
	case t.Kind() == reflect.Slice:
		return "a list"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.Int:
		return "a whole number"
	default:
		return "text"
	}
}

func nodeName(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "mapping"
	case yaml.SequenceNode:
		return "list"
	default:
		return "single value"
	}
}
