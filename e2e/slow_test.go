package e2e_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"kmsd/internal/devserver"
)

// A driver that does nothing for longer than kmsd waits for the others when one serves, but
// for the first that is started.
const slowDriver = `#!/bin/sh
[ "$1" = init-token ] || mkdir %[1]s.first 2>/dev/null || sleep 3
exec %[1]s "$@"
`

// Two HSMs are late, so at the start there is one alone, and a key needs two.
func TestKmsdDevMakesItsDatabaseAlthoughHSMsAreLate(t *testing.T) {
	slow, err := os.MkdirTemp(bin, "slow-")
	if err != nil {
		t.Fatal(err)
	}
	real := filepath.Join(slow, "real")
	for from, to := range map[string]string{"kmsd": filepath.Join(slow, "kmsd"), "kmsd-driver-softhsm": real} {
		if err := os.Link(filepath.Join(bin, from), to); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(slow, "kmsd-driver-softhsm"), fmt.Appendf(nil, slowDriver, real), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	s, err := devserver.Start(ctx, devserver.Config{Bin: slow, Dir: filepath.Join(t.TempDir(), "kmsd"), Env: environment()})
	if err != nil {
		t.Fatal(err)
	}
	endWith(t, s)
	c := dial(t, s)
	if db, err := c.Database(ctx, "shop"); err != nil || db.Name != "shop" {
		t.Errorf("the database of the mount: %+v, %v", db, err)
	}
	allVerify(t, c)
}
