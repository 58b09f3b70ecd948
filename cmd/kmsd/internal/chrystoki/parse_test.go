package chrystoki_test

import (
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/txtar"

	"kmsd/cmd/kmsd/internal/chrystoki"
)

func parse(t *testing.T, text string) *chrystoki.File {
	t.Helper()
	f, err := chrystoki.Parse("x.conf", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestParseReadsEverything(t *testing.T) {
	f := parse(t, `# a comment = {
Chrystoki2 = {
   LibUNIX = /usr/lib/libCryptoki2.so;
   LibUNIX64 = "/opt/luna client/libCryptoki2_64.so";
}
LunaSA Client = { ReceiveTimeout = 1500; }
VirtualToken = {
   VirtualToken01Label = second;
   VirtualToken01SN = 12;
   VirtualToken01Members = 2 3,4;
   VirtualToken00Label = first;
   VirtualToken00StandbyMembers = 1;
   VirtualTokenActiveRecovery = activeEnhanced;
}
HASynchronize = { second = 1; }
HAConfiguration = {
   haonly = 1; AutoReconnectInterval = 90; reconnAtt = -1;
   haLogStatus = enabled; haLogPath = /var/log/luna; logLen = 100; haLogToStdout = disabled;
   failover_on_deactivation = 1; statusTimeout = 3;
   secondStandbyMembers = 4;
}
Misc = { AppIdMajor = 1; AppIdMinor = 2; PE1746Enabled = 0; }
`)
	mark := func(key string, line int) chrystoki.Mark { return chrystoki.Mark{Key: key, Line: line} }
	want := &chrystoki.File{
		Path:    "x.conf",
		Library: chrystoki.Value[string]{V: "/opt/luna client/libCryptoki2_64.so", Mark: mark("Chrystoki2.LibUNIX64", 4)},
		Groups: []chrystoki.Group{{
			Label:   chrystoki.Value[string]{V: "first", Mark: mark("VirtualToken.VirtualToken00Label", 11)},
			Standby: chrystoki.Value[[]string]{V: []string{"1"}, Mark: mark("VirtualToken.VirtualToken00StandbyMembers", 12)},
		}, {
			Number:      1,
			Label:       chrystoki.Value[string]{V: "second", Mark: mark("VirtualToken.VirtualToken01Label", 8)},
			Serial:      chrystoki.Value[string]{V: "12", Mark: mark("VirtualToken.VirtualToken01SN", 9)},
			Members:     chrystoki.Value[[]string]{V: []string{"2", "3", "4"}, Mark: mark("VirtualToken.VirtualToken01Members", 10)},
			Standby:     chrystoki.Value[[]string]{V: []string{"4"}, Mark: mark("HAConfiguration.secondStandbyMembers", 20)},
			Synchronize: chrystoki.Value[bool]{V: true, Mark: mark("HASynchronize.second", 15)},
		}},
		HAOnly:                 chrystoki.Value[bool]{V: true, Mark: mark("HAConfiguration.haonly", 17)},
		Interval:               chrystoki.Value[time.Duration]{V: 90 * time.Second, Mark: mark("HAConfiguration.AutoReconnectInterval", 17)},
		Attempts:               chrystoki.Value[int]{V: -1, Mark: mark("HAConfiguration.reconnAtt", 17)},
		Mode:                   chrystoki.Value[string]{V: "activeEnhanced", Mark: mark("VirtualToken.VirtualTokenActiveRecovery", 13)},
		ReceiveTimeout:         chrystoki.Value[time.Duration]{V: 1500 * time.Millisecond, Mark: mark("LunaSA Client.ReceiveTimeout", 6)},
		StatusTimeout:          chrystoki.Value[time.Duration]{V: 3 * time.Second, Mark: mark("HAConfiguration.statusTimeout", 19)},
		FailoverOnDeactivation: chrystoki.Value[bool]{V: true, Mark: mark("HAConfiguration.failover_on_deactivation", 19)},
		Log: chrystoki.Log{
			Status: chrystoki.Value[bool]{V: true, Mark: mark("HAConfiguration.haLogStatus", 18)},
			Path:   chrystoki.Value[string]{V: "/var/log/luna", Mark: mark("HAConfiguration.haLogPath", 18)},
			Length: chrystoki.Value[int]{V: 100, Mark: mark("HAConfiguration.logLen", 18)},
			Stdout: chrystoki.Value[bool]{Mark: mark("HAConfiguration.haLogToStdout", 18)},
		},
		AppID:   mark("Misc.AppIdMajor", 22),
		Unknown: []chrystoki.Mark{mark("Misc.PE1746Enabled", 22)},
	}
	if !reflect.DeepEqual(f, want) {
		t.Errorf("got\n%+v\nwant\n%+v", f, want)
	}
}

func TestSyntax(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"all on one line", "HAConfiguration={HAOnly=1;}", "1"},
		{"the brace on a line of its own", "HAConfiguration =\n{\nHAOnly = 1;\n}", "3"},
		{"lines of Windows, tabs, a byte order mark", "\ufeffHAConfiguration = {\r\n\tHAOnly\t=\t1;\r\n}\r\n", "2"},
		{"in quotes", "HAConfiguration = { HAOnly = '1' ; }", "1"},
		{"a comment after a value", "HAConfiguration = { # here\n HAOnly = 1; # {\n}; # done", "2"},
		{"the same twice", "HAConfiguration = { HAOnly = 1; }\nHAConfiguration = { HAOnly = 1; }", "1"},
		{"a comment that is not UTF-8", "# M\xfcller\nHAConfiguration = { HAOnly = 1; }", "2"},
		{"an equals sign in a value", "REST = { Secret = a==; }\nHAConfiguration = { HAOnly = 1; }", "2"},
		{"a comment to the end", "HAConfiguration = { HAOnly = 1; } #", "1"},
		{"nothing", "", "0"},
		{"an empty section", "HAConfiguration = { }", "0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := parse(t, c.text)
			if got := fmt.Sprint(f.HAOnly.Line); got != c.want || f.HAOnly.V != f.HAOnly.Set() {
				t.Errorf("HAOnly is %v in line %s, want line %s", f.HAOnly.V, got, c.want)
			}
		})
	}
}

func TestFaultsHaveTheirLine(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"not a Chrystoki.conf", "\nroot:x:0:0\n", "x.conf:2: no section begins here, as in HAConfiguration = { … }; is this a Chrystoki.conf?"},
		{"a file of Windows", "[Luna]\nDefaultTimeOut=1\n", "x.conf:1: this is the syntax of crystoki.ini, of a Windows client; use the Chrystoki.conf of a Unix client"},
		{"no brace", "Misc = 1;", "x.conf:1: after Misc = there has to be a {"},
		{"no brace at the end", "Misc = ", "x.conf:1: after Misc = there has to be a {"},
		{"no name", " = {", "x.conf:1: no section begins here, as in HAConfiguration = { … }; is this a Chrystoki.conf?"},
		{"not closed", "\nMisc = {\n A = 1;\n\n", "x.conf:5: section Misc, of line 2, has no }"},
		{"a section in a section", "Misc = {\n Luna = {\n", "x.conf:2: Luna is a section in a section; is a } missing before it?"},
		{"no semicolon", "Misc = {\n A = sesame\n}", "x.conf:2: the value of A does not end with a ;"},
		{"no semicolon after quotes", "Misc = {\n A = \"sesame\" b;\n}", "x.conf:2: the value of A does not end with a ;"},
		{"an open quote", "Misc = {\n A = \"sesame;\n}", "x.conf:2: the quote of A is not closed"},
		{"a line that is no setting", "Misc = {\n sesame;\n}", "x.conf:2: no setting begins here, as in HAOnly = 0;"},
		{"a control character", "Misc = {\n A = sesa\x1bme;\n}", "x.conf:2: the value of A has characters that cannot be shown"},
		{"a name that cannot be shown", "Mi\u202esc = {\n}", "x.conf:1: no section begins here, as in HAConfiguration = { … }; is this a Chrystoki.conf?"},
		{"a long name", strings.Repeat("a", 129) + " = {}", "x.conf:1: no section begins here, as in HAConfiguration = { … }; is this a Chrystoki.conf?"},
		{"a long value", "Misc = { A = " + strings.Repeat("a", 4097) + "; }", "x.conf:1: the value of A is longer than 4096 bytes"},
		{"too many settings", "Misc = {\n" + strings.Repeat("A=1;", 10_001) + "}", "x.conf:2: more than 10000 settings"},
		{"too long", strings.Repeat("#\n", 1<<19+1), "x.conf:1: longer than 1048576 bytes; that is no Chrystoki.conf"},
		{"all faults of settings at once",
			"HAConfiguration = {\n HAOnly = perhaps;\n reconnAtt = -2;\n AutoReconnectInterval = 1e3;\n}\nLunaSA Client = { ReceiveTimeout = 99999999999; }\nVirtualToken = { VirtualToken00Members = 1, a/b; }",
			"x.conf:7: VirtualToken.VirtualToken00Members: \"a/b\" is not a serial number\n" +
				"x.conf:2: HAConfiguration.HAOnly is \"perhaps\", want 0 or 1\n" +
				"x.conf:4: HAConfiguration.AutoReconnectInterval is \"1e3\", want a whole number of at least 0\n" +
				"x.conf:3: HAConfiguration.reconnAtt is \"-2\", want a whole number of at least -1\n" +
				"x.conf:6: LunaSA Client.ReceiveTimeout is \"99999999999\", want a whole number of at least 0"},
		{"too many groups", manyGroups(101), "x.conf:1: 101 HA groups; a Luna client has at most 100"},
		{"two that differ", "HAConfiguration = { HAOnly = 1; }\nHAConfiguration = { HAOnly = 0; }", "x.conf:2: HAConfiguration.HAOnly says something else than in line 1; keep one"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := chrystoki.Parse("x.conf", []byte(c.text))
			if err == nil || err.Error() != c.want {
				t.Errorf("got\n%v\nwant\n%s", err, c.want)
			}
		})
	}
}

func manyGroups(n int) string {
	var b strings.Builder
	b.WriteString("VirtualToken = {\n")
	for i := range n {
		fmt.Fprintf(&b, "VirtualToken%02dLabel = same;\nVirtualToken%02[1]dMembers = %[1]d;\n", i)
	}
	return b.String() + "}\n"
}

func TestWhatIsNoFileIsNotRead(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		pipe:                       "is not a regular file",
		dir:                        "is not a regular file",
		filepath.Join(dir, "none"): "no such file or directory",
	} {
		if _, err := chrystoki.Load(path); err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", path, err, want)
		}
	}
}

// FuzzParse looks for texts that break the reader, or whose translation is not what
// was read.
func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("testdata/import/*.txtar")
	if err != nil || len(files) == 0 {
		f.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		ar, err := txtar.ParseFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(ar.Files[0].Data)
	}
	f.Add([]byte("A = { B = \"c\" ; # d\n E = 'f'; }\nVirtualToken={VirtualToken9Members=1;}"))
	f.Fuzz(func(t *testing.T, text []byte) {
		file, err := chrystoki.Parse("x.conf", text)
		if (file == nil) == (err == nil) {
			t.Fatalf("got %v and %v: one of them, please", file, err)
		}
		if err != nil {
			if !strings.HasPrefix(err.Error(), "x.conf:") {
				t.Errorf("no line in %q", err)
			}
			return
		}
		file.Review(chrystoki.Choice{Label: "a", Serial: "1"})
		file.Review(chrystoki.Choice{Label: "a"})
		checkTranslation(t, file)
	})
}
