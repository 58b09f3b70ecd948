package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
	"time"
	"unicode/utf8"
)

const (
	hashSize    = sha256.Size
	maxText     = 256      // bytes of a text in a record; what is longer is clipped
	maxSpec     = 1024     // the same for the description of a member, which has paths in it
	maxNamedKey = 3 * 255  // the same for the ID of a data key, whose bytes may take three each
	maxLine     = 32 << 10 // bytes of a line; every byte of a text may take six
)

// A line begins and ends like this, so that the end of a chain can be found
// without reading JSON:
//
//	{"seq":17,"time":"...",...,"prev":"64 digits","hash":"64 digits"}
const (
	lineStart = `{"seq":`
	hashField = `,"hash":"`
	lineEnd   = `"}`
	endSize   = len(hashField) + 2*hashSize + len(lineEnd)
)

// appendStart begins a line.
func appendStart(b []byte, seq uint64) []byte {
	return strconv.AppendUint(append(b, lineStart...), seq, 10)
}

// appendEnd ends the line that begins at start and returns its hash.
func appendEnd(b []byte, start int, prev [hashSize]byte) ([]byte, [hashSize]byte) {
	b = append(b, `,"prev":"`...)
	b = hex.AppendEncode(b, prev[:])
	b = append(b, lineEnd...)
	hash := sha256.Sum256(b[start:]) // the line as it is without the hash
	b = append(b[:len(b)-1], hashField...)
	b = hex.AppendEncode(b, hash[:])
	b = append(b, lineEnd...)
	return append(b, '\n'), hash
}

// appendRecord writes the fields of a record.
func appendRecord(b []byte, r Record) []byte {
	b = appendTime(b, r.Time)
	b = appendText(b, "request_id", r.RequestID)
	b = appendText(b, "principal", r.Principal)
	b = appendText(b, "remote", r.Remote)
	b = appendText(b, "action", r.Action)
	b = appendText(b, "operation", r.Operation)
	b = appendText(b, "group", r.Group)
	b = appendText(b, "key", r.Key)
	b = appendText(b, "database", r.Database)
	b = appendClipped(b, "named_key", url.PathEscape(r.NamedKey), maxNamedKey)
	b = appendText(b, "job", r.Job)
	b = appendNumber(b, "version", int64(r.Version))
	b = appendNumber(b, "items", int64(r.Items))
	b = appendNumber(b, "failed", int64(r.Failed))
	b = appendText(b, "member", r.Member)
	b = appendMark(b, "allow_degraded", r.AllowDegraded)
	b = appendMark(b, "force", r.Force)
	b = appendMark(b, "adopt", r.Adopt)
	b = appendClipped(b, "spec", r.Spec, maxSpec)
	b = appendNumber(b, "suppressed", int64(r.Suppressed))
	b = appendText(b, "outcome", r.Outcome)
	return strconv.AppendInt(append(b, `,"duration_us":`...), r.Duration.Microseconds(), 10)
}

// eventRecovered marks the record that accounts for a line that was cut.
const eventRecovered = "recovered"

// appendRecovered writes the fields of the record after a line that was cut.
func appendRecovered(b []byte, now time.Time, t tail) []byte {
	b = appendTime(b, now)
	b = appendText(b, "event", eventRecovered)
	b = appendNumber(b, "cut_bytes", t.cutBytes)
	return appendText(b, "cut_sha256", hex.EncodeToString(t.cutSum[:]))
}

func appendTime(b []byte, t time.Time) []byte {
	b = append(b, `,"time":"`...)
	b = t.UTC().AppendFormat(b, time.RFC3339Nano)
	return append(b, '"')
}

func appendNumber(b []byte, name string, n int64) []byte {
	if n == 0 {
		return b
	}
	return strconv.AppendInt(appendName(b, name), n, 10)
}

func appendMark(b []byte, name string, set bool) []byte {
	if !set {
		return b
	}
	return append(appendName(b, name), "true"...)
}

func appendText(b []byte, name, text string) []byte {
	return appendClipped(b, name, text, maxText)
}

func appendClipped(b []byte, name, text string, most int) []byte {
	if text == "" {
		return b
	}
	b = appendName(b, name)
	text = clip(text, most)
	if plain(text) {
		b = append(b, '"')
		b = append(b, text...)
		return append(b, '"')
	}
	quoted, err := json.Marshal(text)
	if err != nil {
		panic(fmt.Sprintf("a string that is not JSON: %v", err)) // cannot be
	}
	return append(b, quoted...)
}

func appendName(b []byte, name string) []byte {
	b = append(b, ',', '"')
	b = append(b, name...)
	return append(b, '"', ':')
}

// clip shortens a text to most bytes, at the border of a character.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	const dots = "..."
	n := most - len(dots)
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + dots
}

// plain says whether a text is JSON as it stands.
func plain(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}

// parsed is what the chain needs of a line.
type parsed struct {
	Seq       uint64    `json:"seq"`
	Time      time.Time `json:"time"`
	Event     string    `json:"event"`
	CutBytes  int64     `json:"cut_bytes"`
	CutSHA256 string    `json:"cut_sha256"`
	Prev      string    `json:"prev"`

	hash [hashSize]byte
	prev [hashSize]byte
}

// complete says whether a line has the form of a whole record, so that it cannot
// be the beginning of one that was cut.
func complete(line []byte) bool {
	_, _, ok := splitHash(line)
	return ok
}

// splitHash takes the hash off a line and returns both.
func splitHash(line []byte) (body []byte, hash [hashSize]byte, ok bool) {
	n := len(line) - endSize
	if n < 0 || !bytes.HasPrefix(line, []byte(lineStart)) || !bytes.HasSuffix(line, []byte(lineEnd)) ||
		!bytes.HasPrefix(line[n:], []byte(hashField)) {
		return nil, hash, false
	}
	digits := line[n+len(hashField) : len(line)-len(lineEnd)]
	if _, err := hex.Decode(hash[:], digits); err != nil || !bytes.Equal(hex.AppendEncode(nil, hash[:]), digits) {
		return nil, hash, false // upper case is not how it was written
	}
	return append(bytes.Clone(line[:n]), '}'), hash, true
}

// parse reads a whole line without its end and checks its own hash.
func parse(line []byte) (p parsed, ok bool) {
	body, hash, ok := splitHash(line)
	if !ok || len(line) > maxLine || sha256.Sum256(body) != hash {
		return parsed{}, false
	}
	if err := json.Unmarshal(line, &p); err != nil {
		return parsed{}, false
	}
	if len(p.Prev) != 2*hashSize {
		return parsed{}, false
	}
	if _, err := hex.Decode(p.prev[:], []byte(p.Prev)); err != nil {
		return parsed{}, false
	}
	p.hash = hash
	return p, true
}
