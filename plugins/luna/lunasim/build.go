package lunasim

import (
	"embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"kmsd/internal/faultlib"
)

//go:embed src
var sources embed.FS

// built is what the compiler made.
type built struct {
	library []byte
	keydump []byte
}

var builds struct {
	mu   sync.Mutex // held while compiling: a second test would only wait for the same
	done map[string]built
}

// Build compiles the library, once for each choice of functions in the life of the
// process, and returns its path. It opens no partition by itself: see [New].
func Build(t testing.TB, without ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "lunasim.so")
	if err := os.WriteFile(path, compile(t, without).library, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func compile(t testing.TB, without []string) built {
	t.Helper()
	key := strings.Join(slices.Sorted(slices.Values(without)), " ")
	builds.mu.Lock()
	defer builds.mu.Unlock()
	if b, ok := builds.done[key]; ok {
		return b
	}
	dir, err := os.MkdirTemp("", "lunasim-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir) // what is left behind there harms nobody
	files := unpack(t, dir)
	if err := os.WriteFile(filepath.Join(dir, "fault.h"), faultlib.Header, 0o600); err != nil {
		t.Fatal(err)
	}
	headers, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		t.Fatalf("looking for the PKCS#11 headers: %v", err)
	}
	flags := []string{"-O1", "-Wall", "-Wextra", "-Werror", "-I" + strings.TrimSpace(string(headers)), "-I" + dir}
	link := append([]string{"-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-Bsymbolic", "-Wl,--version-script=" + exports(t, dir, without)}, files...)
	b := built{
		library: gcc(t, dir, "lunasim.so", append(flags, link...)),
		keydump: gcc(t, dir, "keydump", append(flags, filepath.Join(dir, "keydump.c"))),
	}
	if builds.done == nil {
		builds.done = map[string]built{}
	}
	builds.done[key] = b
	return b
}

// unpack writes the sources and returns those of the library.
func unpack(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := sources.ReadDir("src")
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, e := range entries {
		text, err := sources.ReadFile("src/" + e.Name())
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, e.Name())
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(path, ".c") && e.Name() != "keydump.c" {
			files = append(files, path)
		}
	}
	return files
}

// exports writes the list of what dlsym finds, which is everything but some functions.
func exports(t testing.TB, dir string, without []string) string {
	t.Helper()
	local := append(slices.Clone(without), "nothing_else")
	path := filepath.Join(dir, "exports.map")
	script := fmt.Sprintf("{ local: %s; };\n", strings.Join(local, "; "))
	if err := os.WriteFile(path, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func gcc(t testing.TB, dir, name string, args []string) []byte {
	t.Helper()
	out := filepath.Join(dir, name)
	cmd := exec.CommandContext(t.Context(), "gcc", append(args, "-o", out, "-ldl", "-lpthread")...)
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("compiling the Luna double: %v\n%s", err, msg)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
