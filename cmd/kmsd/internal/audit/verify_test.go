package audit_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	"kmsd/cmd/kmsd/internal/audit"
)

func TestVerifyNamesTheFirstBadLine(t *testing.T) {
	lines := bytes.SplitAfter(mustRead(t, newLog(t, 6)), []byte("\n"))[:6]
	other := bytes.SplitAfter(mustRead(t, newLog(t, 6)), []byte("\n"))[:6]
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	edit := func(line []byte, old, new string) []byte { return bytes.Replace(line, []byte(old), []byte(new), 1) }
	cases := []struct {
		name string
		log  []byte
		line int
		why  audit.Why
	}{
		{"a key's name is altered", join(lines[0], lines[1], edit(lines[2], "key-3", "key-9"), lines[3]), 3, audit.Altered},
		{"an outcome is altered", join(lines[0], edit(lines[1], `"ok"`, `"no"`)), 2, audit.Altered},
		{"a hash is altered", join(lines[0], edit(lines[1], `"hash":"`, `"hash":"0`)), 2, audit.Altered},
		{"a line is taken out", join(lines[0], lines[1], lines[3], lines[4]), 3, audit.Removed},
		{"the beginning is taken out and the number with it", join([]byte("{}\n"), lines[1]), 1, audit.Altered},
		{"two lines change places", join(lines[0], lines[2], lines[1]), 2, audit.Removed},
		{"a line comes again", join(lines[0], lines[1], lines[1]), 3, audit.Reordered},
		{"an old line is moved to the end", join(lines[0], lines[1], lines[2], lines[0]), 4, audit.Reordered},
		{"a line was written anew with its hash", join(lines[0], other[1], lines[2]), 2, audit.Altered},
		{"the last line is cut", join(lines[0], lines[1][:50]), 2, audit.Cut},
		{"the end of the last line is cut", join(lines[0], bytes.TrimSpace(lines[1])), 2, audit.Cut},
		{"a line in the middle is cut", join(lines[0], lines[1][:50], []byte("\n"), lines[2]), 2, audit.Altered},
		{"foreign text in the middle", join(lines[0], []byte("hello\n"), lines[1]), 2, audit.Altered},
		{"foreign text at the end", join(lines[0], []byte("hello\nthere\n")), 2, audit.Altered},
		{"an empty line", join(lines[0], []byte("\n"), lines[1]), 2, audit.Altered},
		{"a line of megabytes", join(lines[0], bytes.Repeat([]byte("x"), 3<<20), []byte("\n"), lines[1]), 2, audit.Altered},
		{"something that is no log", []byte("root:x:0:0:root:/root:/bin/bash\n"), 1, audit.Altered},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := audit.Verify(bytes.NewReader(c.log))
			var broken *audit.BrokenError
			if !errors.As(err, &broken) || broken.Line != c.line || broken.Why != c.why {
				t.Errorf("%v, want line %d %s", err, c.line, c.why)
			}
		})
	}
	if report, err := audit.Verify(bytes.NewReader(join(lines[2:]...))); err != nil || report.First != 3 || report.Records != 4 {
		t.Errorf("a log that goes on from another file: %+v, %v", report, err)
	}
	if report, err := audit.Verify(bytes.NewReader(nil)); err != nil || report.Records != 0 {
		t.Errorf("an empty log: %+v, %v", report, err)
	}
}

func TestEveryAlteredBitIsNoticed(t *testing.T) {
	good := mustRead(t, newLog(t, 3))
	for i := range 8 * len(good) {
		b := bytes.Clone(good)
		b[i/8] ^= 1 << (i % 8)
		if _, err := audit.Verify(bytes.NewReader(b)); err == nil {
			t.Errorf("bit %d of byte %d (%q) may be altered", i%8, i/8, good[i/8])
		}
	}
}

// FuzzLog gives Verify and Open foreign bytes. A log that was good, or only cut at
// its end, is good again after Open and Write.
func FuzzLog(f *testing.F) {
	good := mustRead(f, newLog(f, 3))
	f.Add(good)
	f.Add(good[:len(good)-70])
	f.Add([]byte(`{"seq":`))
	f.Add([]byte("\n\n"))
	f.Add(append(bytes.Clone(good), "\x00\x00\n{\"seq\":9"...))
	path := filepath.Join(f.TempDir(), "audit.jsonl")
	f.Fuzz(func(t *testing.T, b []byte) {
		_, before := audit.Verify(bytes.NewReader(b))
		write(t, path, b)
		l, err := audit.Open(path)
		if err != nil {
			return
		}
		mustWrite(t, l, audit.Record{Action: "wrap"})
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		after, err := audit.Verify(bytes.NewReader(mustRead(t, path)))
		if before == nil && (err != nil || after.Recoveries > 0 && !bytes.Contains(b, []byte("recovered"))) {
			t.Errorf("a good log: %v, %+v", err, after)
		}
		var broken *audit.BrokenError
		if errors.As(before, &broken) && broken.Why == audit.Cut && err != nil {
			t.Errorf("a log that was cut: %v after %v", err, before)
		}
	})
}
