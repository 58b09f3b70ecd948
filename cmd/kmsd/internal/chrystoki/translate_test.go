package chrystoki_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"

	"kmsd/cmd/kmsd/internal/chrystoki"
	"kmsd/cmd/kmsd/internal/config"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestTranslations runs testdata/import/*.txtar: a Chrystoki.conf, and the
// configuration that is made of it with what kmsd understands of that, or an error.
func TestTranslations(t *testing.T) {
	files, err := filepath.Glob("testdata/import/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		file, err := filepath.Abs(file)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			t.Chdir(dir)
			write(t, chrystoki.FileName, 0o644, string(ar.Files[0].Data))
			got := translate(t, dir)
			for i, f := range ar.Files[1:] {
				if *update {
					ar.Files[i+1].Data = []byte(got[f.Name])
				} else if want := string(f.Data); got[f.Name] != want {
					t.Errorf("%s: got\n%s\nwant\n%s", f.Name, got[f.Name], want)
				}
			}
			if *update {
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// translate returns what comes of the Chrystoki.conf in the working directory, by the
// names that the parts of a case have.
func translate(t *testing.T, dir string) map[string]string {
	t.Helper()
	f, err := chrystoki.Load(chrystoki.FileName)
	if err != nil {
		return map[string]string{"error": err.Error() + "\n"}
	}
	tr, err := f.Translate()
	if err != nil {
		return map[string]string{"error": err.Error() + "\n"}
	}
	var out bytes.Buffer
	if err := tr.WriteYAML(&out); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out.String(), "keep-this-out") {
		t.Errorf("a secret of the client is in\n%s", out.String())
	}
	return map[string]string{
		"groups.yaml": strings.ReplaceAll(out.String(), dir, "$DIR"),
		"loaded":      strings.ReplaceAll(load(t, tr, out.String()), dir, "$DIR"),
	}
}

// load fills in what the operator has to, loads the configuration and says what it means.
func load(t *testing.T, tr *chrystoki.Translation, groups string) string {
	t.Helper()
	write(t, "drivers/kmsd-driver-luna", 0o755, "#!/bin/sh\n")
	sum, err := config.Sum("drivers/kmsd-driver-luna")
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range tr.Groups {
		write(t, g.Domain.File, 0o600, strings.Repeat("d", 44))
		for _, m := range g.Members {
			write(t, m.PIN.File, 0o600, "pin")
		}
	}
	write(t, "tokens.yaml", 0o600, "")
	write(t, "policies.yaml", 0o600, "")
	write(t, "kmsd.yaml", 0o600, `listen: ["unix:///run/kmsd.sock"]
catalog: {bolt: {path: catalog.db}}
driver_dir: drivers
auth: {tokens: tokens.yaml, policies: policies.yaml}
audit: {file: audit.jsonl}
`+strings.ReplaceAll(groups, `sha256: ""`, "sha256: "+sum))
	cfg, err := config.Load("kmsd.yaml", config.Options{Environ: []string{}})
	if err != nil {
		t.Fatalf("kmsd does not take it: %v\n%s", err, groups)
	}
	var b strings.Builder
	for i, g := range cfg.KMS(nil, nil).Groups {
		fmt.Fprintf(&b, "%s: commands %v, recovery manual %v, every %v, %d times\n",
			g.Name, g.CommandTimeout, g.Recovery.Manual, g.Recovery.Interval, g.Recovery.Retries)
		for j, m := range g.Members {
			fmt.Fprintf(&b, "  %s %s standby %v %v\n", m.Name, m.Driver, m.Standby, m.Settings)
			if want := tr.Groups[i].Members[j].Settings; m.Settings["token_serial"] != want.TokenSerial {
				t.Errorf("member %s has the serial number %q, want %q", m.Name, m.Settings["token_serial"], want.TokenSerial)
			}
		}
	}
	return b.String()
}

func write(t *testing.T, name string, mode os.FileMode, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(name, mode); err != nil { // whatever the umask is
		t.Fatal(err)
	}
}

func TestJSONSaysWhatYAMLSays(t *testing.T) {
	f := parse(t, "VirtualToken = { VirtualToken00Label = a; VirtualToken00Members = 12; }\nHAConfiguration = { reconnAtt = 3; HAOnly = 0; }")
	tr, err := f.Translate()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(tr)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"groups":[{"name":"a","domain":{"file":"a.domain"},"recovery":{"mode":"auto","retries":3},` +
		`"members":[{"name":"luna-12","driver":"luna","sha256":"","pin":{"file":"luna-12.pin"},"settings":{"token_serial":"12"}}]}],"notes":[`
	if !strings.HasPrefix(string(text), want) {
		t.Errorf("got\n%s\nwant\n%s…", text, want)
	}
	for _, note := range []string{
		`{"path":"groups[0].recovery.retries","text":"HAConfiguration.reconnAtt","line":2}`,
		`{"path":"groups[0].members[0].settings.token_serial","text":"VirtualToken.VirtualToken00Members","line":1}`,
	} {
		if !strings.Contains(string(text), note) {
			t.Errorf("the note %s is not in\n%s", note, text)
		}
	}
}

func TestNamesOfGroups(t *testing.T) {
	for _, c := range []struct{ name, label, want string }{
		{"a name stays", "payments-1.a_b", "payments-1.a_b"},
		{"case and blanks go", "My HA  Group", "my-ha-group"},
		{"a name begins with a letter or digit", "--x", "x"},
		{"letters that are not ASCII go", "Zürich", "z-rich"},
		{"nothing is left", "京都", "ha"},
		{"a label is missing", "", "ha"},
		{"a long label is cut", strings.Repeat("a", 70), strings.Repeat("a", 63)},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := "VirtualToken = {\nVirtualToken00Members = 1;\nVirtualToken01Members = 2;\n"
			if c.label != "" {
				text += "VirtualToken00Label = " + c.label + ";\nVirtualToken01Label = " + c.label + ";\n"
			}
			tr, err := parse(t, text+"}").Translate()
			if err != nil {
				t.Fatal(err)
			}
			second := c.want[:min(len(c.want), 61)] + "-2"
			if got := []string{tr.Groups[0].Name, tr.Groups[1].Name}; got[0] != c.want || got[1] != second {
				t.Errorf("got %q, want %q and %q", got, c.want, second)
			}
		})
	}
}

func TestAGroupOfTooManyMembersIsRefused(t *testing.T) {
	text := "VirtualToken = {\nVirtualToken00Label = big;\nVirtualToken00Members = 1"
	for i := range 32 {
		text += fmt.Sprintf(", %d", i+2)
	}
	_, err := parse(t, text+";\n}").Translate()
	if want := `x.conf:2: the Luna HA group "big" has 33 members; at most 32`; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}
