package mariadb_test

import (
	"context"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestDemo(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute) // it gives itself three
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(bin, "mariadb-demo"), "--bin", bin).CombinedOutput()
	t.Logf("\n%s", out)
	if err != nil || !strings.Contains(string(out), "Everything held") {
		t.Errorf("the demo: %v", err)
	}
}
