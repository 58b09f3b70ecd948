package backup_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"filippo.io/age"

	"kmsd/kms/backup"
)

// seal encrypts lines as a backup is, whatever they are.
func seal(t testing.TB, id *age.X25519Identity, text []byte) []byte {
	t.Helper()
	var file bytes.Buffer
	w, err := age.Encrypt(&file, id.Recipient())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(text); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return file.Bytes()
}

// unsealed returns the lines of the sample.
func unsealed(t testing.TB, id *age.X25519Identity) []string {
	t.Helper()
	file, _, err := write(t, id, sample())
	if err != nil {
		t.Fatal(err)
	}
	r, err := age.Decrypt(bytes.NewReader(file), id)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return strings.SplitAfter(strings.TrimSuffix(string(text), "\n"), "\n")
}

// trailed ends lines with a trailer that fits them.
func trailed(lines []string) string {
	text := strings.Join(lines, "")
	sum := sha256.Sum256([]byte(text))
	return text + fmt.Sprintf(`{"trailer":{"keys":2,"versions":3,"databases":2,"named_keys":4,"lines":%d,"sha256":%q}}`, len(lines), hex.EncodeToString(sum[:])) + "\n"
}

// Somebody who has the recipient can encrypt anything.
func TestForgedLinesAreNoBackup(t *testing.T) {
	id := newIdentity(t)
	lines := unsealed(t, id)
	body := lines[:len(lines)-1]
	with := func(i int, old, new string) string {
		changed := append([]string(nil), body...)
		if !strings.Contains(changed[i], old) {
			t.Fatalf("line %q has no %q", changed[i], old)
		}
		changed[i] = strings.Replace(changed[i], old, new, 1)
		return trailed(changed)
	}
	if _, err := backup.Verify(bytes.NewReader(seal(t, id, []byte(trailed(body)))), id); err != nil {
		t.Fatalf("what was not changed: %v", err)
	}
	for _, c := range []struct{ name, text, says string }{
		{"nothing", "", "cut short"},
		{"something else", "hello\n", "does not begin as one"},
		{"another format", with(0, "kmsd backup", "other"), "does not begin as one"},
		{"a newer version", with(0, `"version":1`, `"version":2,"more":3`), "version 2, this kmsd knows version 1"},
		{"a header with more in it", with(0, `"version":1`, `"version":1,"more":3`), "unknown field"},
		{"a group without a domain", with(0, `"CQ=="`, `""`), `group "g"`},
		{"no trailer", strings.Join(body, ""), "cut short"},
		{"a line that is cut", trailed(body)[:len(trailed(body))-1], "cut short"},
		{"a trailer of another sum", strings.Join(body, "") + strings.Replace(lines[len(lines)-1], `"sha256":"`, `"sha256":"0`, 1) + "\n", "check sum"},
		{"a trailer of other numbers", strings.Replace(trailed(body), `"keys":2`, `"keys":3`, 1), "its numbers"},
		{"two trailers", trailed(body) + lines[len(lines)-1] + "\n", "something follows"},
		{"an empty line", trailed(append(append([]string(nil), body...), "\n")), "no line of a backup"},
		{"two headers", trailed(append(append([]string(nil), body...), body[0])), "second header"},
		{"two things in one line", with(1, "\n", " {}\n"), "two things"},
		{"a line of nothing", trailed(append(append([]string(nil), body...), "{}\n")), "0 things"},
		{"a record with more in it", with(1, `"schema":1`, `"schema":1,"more":3`), "more"},
		{"a record of a kind that stays", with(1, `"job"`, `"intent"`), "does not leave"},
		{"a record of an unknown kind", with(1, `"job"`, `"rot13"`), "unknown kind"},
		{"a line that is too long", body[0] + strings.Repeat("x", 5<<20) + "\n", "more than"},
	} {
		_, err := backup.Verify(bytes.NewReader(seal(t, id, []byte(c.text))), id)
		if !errors.Is(err, backup.ErrDamaged) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error %v, want %q", c.name, err, c.says)
		}
	}
}

func FuzzReader(f *testing.F) {
	id := newIdentity(f)
	lines := unsealed(f, id)
	f.Add([]byte(strings.Join(lines, "") + "\n"))
	f.Add([]byte(trailed(lines[:len(lines)-1])))
	f.Add([]byte(lines[0]))
	for _, l := range lines[1:] {
		f.Add([]byte(lines[0] + l))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		contents, err := backup.Verify(bytes.NewReader(seal(t, id, text)), id)
		if err != nil && !errors.Is(err, backup.ErrDamaged) {
			t.Errorf("error %v", err)
		}
		if err == nil && len(contents.Groups) == 0 && contents.Versions > 0 {
			t.Errorf("keys of no group: %+v", contents)
		}
	})
}

func FuzzFile(f *testing.F) {
	id := newIdentity(f)
	file, _, err := write(f, id, sample())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file)
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := backup.Verify(bytes.NewReader(b), id); err == nil && !bytes.Equal(b, file) {
			t.Error("an altered file is a backup")
		}
	})
}
