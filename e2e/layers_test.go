package e2e_test

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// dependency is a package that another one needs.
type dependency struct {
	path     string
	standard bool
	cgo      bool
	imports  []string
}

func dependencies(t *testing.T, patterns ...string) []dependency {
	t.Helper()
	format := "{{.ImportPath}}\t{{.Standard}}\t{{len .CgoFiles}}\t{{join .Imports \" \"}}"
	cmd := exec.Command("go", append([]string{"list", "-deps", "-f", format}, patterns...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1") // else files with cgo are left out
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list -deps %v: %v", patterns, err)
	}
	var deps []dependency
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		deps = append(deps, dependency{path: f[0], standard: f[1] == "true", cgo: f[2] != "0", imports: strings.Fields(f[3])})
	}
	return deps
}

// below reports whether a package is root or in a folder below it.
func below(path, root string) bool { return path == root || strings.HasPrefix(path, root+"/") }

func TestLayers(t *testing.T) {
	tests := []struct {
		name   string
		of     []string
		banned func(d dependency) bool
	}{
		{
			"drivers know nothing of the core", []string{"kmsd/plugins/..."},
			func(d dependency) bool { return below(d.path, "kmsd/kms") || below(d.path, "kmsd/cmd") },
		},
		{
			"the core and the daemon never reach cgo", []string{"kmsd/kms", "kmsd/kms/client", "kmsd/kms/api", "kmsd/kms/catalog/...", "kmsd/cmd/..."},
			func(d dependency) bool { return d.cgo && !d.standard || below(d.path, "kmsd/plugins") },
		},
		{
			"HTTP knows nothing of tokens", []string{"kmsd/cmd/kmsd/internal/httpapi"},
			func(d dependency) bool { return below(d.path, "kmsd/pluginproto") },
		},
		{
			"numbers come from the words of the API alone", []string{"kmsd/cmd/kmsd/internal/metrics"},
			func(d dependency) bool {
				return below(d.path, "kmsd") && !below(d.path, "kmsd/kms/api") && d.path != "kmsd/cmd/kmsd/internal/metrics"
			},
		},
		{
			"a client brings no part of the server", []string{"kmsd/kms/client"},
			func(d dependency) bool {
				return below(d.path, "kmsd/pluginproto") || below(d.path, "kmsd/kms/catalog") || below(d.path, "google.golang.org/grpc") || d.path == "kmsd/kms"
			},
		},
		{
			"the core does not choose its store", []string{"kmsd/kms"},
			func(d dependency) bool {
				return below(d.path, "go.etcd.io") || below(d.path, "kmsd/kms/catalog/boltcat")
			},
		},
		{
			"the contract stands on nothing of ours", []string{"kmsd/pluginproto/..."},
			func(d dependency) bool { return below(d.path, "kmsd") && !below(d.path, "kmsd/pluginproto") },
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, d := range dependencies(t, tt.of...) {
				if tt.banned(d) {
					t.Errorf("%s is needed", d.path)
				}
			}
		})
	}
}

// What drags in a big library is one room, so that the others can do without.
func TestLibrariesAreInTheirLeavesOnly(t *testing.T) {
	leaves := []struct{ library, room string }{
		{"go.etcd.io/bbolt", "kmsd/kms/catalog/boltcat"},
		{"github.com/prometheus", "kmsd/cmd/kmsd/internal/metrics"},
	}
	for _, d := range dependencies(t, "kmsd/...") {
		for _, leaf := range leaves {
			uses := slices.ContainsFunc(d.imports, func(path string) bool { return below(path, leaf.library) })
			if uses && below(d.path, "kmsd") && d.path != leaf.room {
				t.Errorf("%s imports %s", d.path, leaf.library)
			}
		}
	}
}

func TestTheCoreBuildsWithoutCgo(t *testing.T) {
	cmd := exec.Command("go", "build", "kmsd/cmd/kmsd", "kmsd/kms", "kmsd/kms/client") // several: nothing is written
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
