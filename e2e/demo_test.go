package e2e_test

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestDemo(t *testing.T) {
	out, errs, code := runProgram(t, nil, "", filepath.Join(bin, "tde-demo"), "--bin", bin)
	t.Log("\n" + out)
	if code != 0 || !strings.Contains(out, "Everything held") {
		t.Errorf("exit code %d: %s", code, errs)
	}
}
