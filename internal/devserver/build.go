package devserver

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// program is a package of this module with a main function.
type program struct {
	name, path string
	cgo        bool
}

// Build makes in dir kmsd and its driver for SoftHSM, and more programs of this module, each
// a name with the path of its package. They are made without the race detector, as they
// are used, and all but drivers without cgo. It needs to run inside the module.
//
// The sockets of drivers come to be below the folder for temporary files; where that is dir,
// its path has to be short.
func Build(ctx context.Context, dir string, more map[string]string) error {
	programs := []program{{"kmsd", "kmsd/cmd/kmsd", false}, {"kmsd-driver-softhsm", "kmsd/plugins/softhsm", true}}
	for name, path := range more {
		programs = append(programs, program{name, path, strings.HasPrefix(path, "kmsd/plugins/")})
	}
	for _, p := range programs {
		cgo := "CGO_ENABLED=0"
		if p.cgo {
			cgo = "CGO_ENABLED=1"
		}
		cmd := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, p.name), p.path)
		cmd.Env = append(os.Environ(), cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %w\n%s", p.path, err, out)
		}
	}
	return nil
}
