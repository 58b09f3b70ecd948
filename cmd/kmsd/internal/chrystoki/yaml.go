package chrystoki

import (
	"bytes"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v3"
)

const (
	maxBeside = 60 // characters of a comment that stands beside its value
	maxLine   = 96 // characters of a comment that stands above
)

// WriteYAML writes the groups as YAML, each note as a comment at what it is about.
func (t *Translation) WriteYAML(w io.Writer) error {
	var doc yaml.Node
	if err := doc.Encode(t); err != nil {
		return fmt.Errorf("writing YAML: %w", err)
	}
	notes := map[string][]Note{} // :: path → what there is to know about it
	for _, n := range t.Notes {
		notes[n.Path] = append(notes[n.Path], n)
	}
	annotate(&doc, "", notes)
	var b bytes.Buffer
	for _, n := range notes[""] {
		b.WriteString(above(n) + "\n")
		if n.Line == 0 {
			b.WriteString("#\n")
		}
	}
	b.WriteByte('\n')
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(&doc); err != nil {
		return fmt.Errorf("writing YAML: %w", err)
	}
	_, err := w.Write(b.Bytes())
	return err
}

// annotate puts the notes about what is in n beside the values, or above their keys.
func annotate(n *yaml.Node, path string, notes map[string][]Note) {
	switch n.Kind {
	case yaml.SequenceNode:
		for i, e := range n.Content {
			annotate(e, fmt.Sprintf("%s[%d]", path, i), notes)
		}
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, value := n.Content[i], n.Content[i+1]
			at := strings.TrimPrefix(path+"."+key.Value, ".")
			for _, note := range notes[at] {
				comment(key, value, note)
			}
			annotate(value, at, notes)
		}
	}
}

func comment(key, value *yaml.Node, n Note) {
	text := n.Text
	if n.Line > 0 {
		text += fmt.Sprintf(", line %d", n.Line)
	}
	if len(text) <= maxBeside && value.Kind == yaml.ScalarNode && value.LineComment == "" {
		value.LineComment = "# " + text
		return
	}
	key.HeadComment = strings.TrimPrefix(key.HeadComment+"\n"+above(n), "\n")
}

// above is a note as lines of comment.
func above(n Note) string {
	var lines []string
	line := "#"
	if n.Line > 0 {
		line += fmt.Sprintf(" line %d:", n.Line)
	}
	for _, word := range strings.Fields(n.Text) {
		if len(line)+1+len(word) > maxLine && line != "#" {
			lines = append(lines, line)
			line = "#"
		}
		line += " " + word
	}
	return strings.Join(append(lines, line), "\n")
}
