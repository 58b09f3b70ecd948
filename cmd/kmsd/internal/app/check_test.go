package app_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kmsd/cmd/kmsd/internal/app"
	"kmsd/cmd/kmsd/internal/config"
	"kmsd/internal/softhsmtest"
)

// everyFault is a configuration with one fault of each kind that an operator is
// likely to make. $CONF is a store of tokens: good, one, and two tokens named twin. The
// member hsm-slow has none: it only takes longer than a server waits for one of several.
const everyFault = `listen: ["unix://$DIR/kmsd.sock"]
catalog: {bolt: {path: catalog.db}}
driver_dir: .
auth: {tokens: tokens.yaml, policies: policies.yaml}
audit: {file: nowhere/audit.jsonl}
audits: {}
groups:
  - name: default
    domain: {file: domain}
    min_copys: 2
    members:
      - name: hsm-good
        driver: softhsm
        sha256: $SUM
        pin: {file: pin}
        settings: {token_label: good, softhsm_conf: $CONF}
      - name: hsm-wrong-pin
        driver: softhsm
        sha256: $SUM
        pin: {file: wrong.pin}
        settings: {token_label: one, softhsm_conf: $CONF}
      - name: hsm-no-module
        driver: softhsm
        sha256: $SUM
        pin: {file: pin}
        settings: {module: /nowhere/lib.so, token_label: one, softhsm_conf: $CONF}
      - name: hsm-no-token
        driver: softhsm
        sha256: $SUM
        pin: {file: pin}
        settings: {token_label: none, softhsm_conf: $CONF}
      - name: hsm-twin
        driver: softhsm
        sha256: $SUM
        pin: {file: pin}
        settings: {token_label: twin, softhsm_conf: $CONF}
      - name: hsm-open-pin
        driver: softhsm
        sha256: $SUM
        pin: {file: open.pin}
        settings: {token_label: open, softhsm_conf: $CONF}
      - name: hsm-no-pin
        driver: softhsm
        sha256: $SUM
        pin: {file: no.pin}
        settings: {token_label: nopin, softhsm_conf: $CONF}
      - name: hsm-bad-setting
        driver: softhsm
        sha256: $SUM
        pin: {file: pin}
        settings: {token_lable: good, softhsm_conf: $CONF}
      - name: hsm-slow
        driver: softhsm
        sha256: $SUM
        pin: {exec: [sh, -c, "sleep 3; cat $DIR/pin"]}
        settings: {token_label: slow, softhsm_conf: $CONF}
  - name: other
    domain: {file: open.domain}
    members:
      - name: hsm-other
        driver: softhsm
        sha256: $SUM
        pin: {file: wrong.pin}
        settings: {token_label: other, softhsm_conf: $CONF}
`

// wantFaults are those of everyFault, as :: where → what it says.
var wantFaults = [...]struct{ origin, says string }{
	{"kmsd.yaml:5", "nowhere: no such file or directory"},
	{"kmsd.yaml:6", "audits: unknown key; did you mean audit?"},
	{"kmsd.yaml:10", "groups[0].min_copys: unknown key; did you mean min_copies?"},
	{"kmsd.yaml:17", "hsm-wrong-pin is failed: "},
	{"kmsd.yaml:26", "/nowhere/lib.so: no such file or directory"},
	{"kmsd.yaml:27", `there is no token with the label "none"`},
	{"kmsd.yaml:32", `there are 2 tokens with the label "twin"; choose one by token_serial`},
	{"kmsd.yaml:40", "mode 0644 lets others at $DIR/open.pin; chmod 600 it"},
	{"kmsd.yaml:45", "$DIR/no.pin: no such file or directory"},
	{"kmsd.yaml:47", `unknown setting "token_lable"`},
	{"kmsd.yaml:58", "mode 0644 lets others at $DIR/open.domain; chmod 600 it"},
	{"kmsd.yaml:60", "hsm-other is failed: "},
	{"policies.yaml:3", `unknown action "fly"`},
	{"tokens.yaml:2", `there is no policy "nobody"`},
}

func TestCheckTellsEveryFaultInOneMessage(t *testing.T) {
	dir := faultySite(t)
	args := []string{"check", "-c", filepath.Join(dir, "kmsd.yaml")}

	var out, errs bytes.Buffer
	if code := app.Main(t.Context(), args, app.Streams{In: strings.NewReader(""), Out: &out, Err: &errs}); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	text := errs.String()
	at := 0
	for _, want := range wantFaults {
		line := "\n  " + filepath.Join(dir, want.origin) + ": "
		i := strings.Index(text[at:], line)
		if i < 0 {
			t.Errorf("after byte %d there is no line for %s", at, want.origin)
			continue
		}
		at += i + 1
		says := strings.ReplaceAll(want.says, "$DIR", dir)
		if fault, _, _ := strings.Cut(text[at:], "\n"); !strings.Contains(fault, says) {
			t.Errorf("%s does not say %q", fault, says)
		}
	}
	if n := strings.Count(text, "\n") - 1; n != len(wantFaults) {
		t.Errorf("%d faults, want %d", n, len(wantFaults))
	}
	if t.Failed() {
		t.Log(text)
	}
	if strings.Contains(text, softhsmtest.PIN) || strings.Contains(text, "wrong-one") {
		t.Errorf("a PIN is in the message:\n%s", text)
	}

	// The same for a program, without the members: a second wrong PIN is not tried.
	out.Reset()
	if code := app.Main(t.Context(), append(args, "--offline", "-o", "json"), app.Streams{In: strings.NewReader(""), Out: &out, Err: &errs}); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	var found struct {
		Faults []config.Fault `json:"faults"`
	}
	if err := json.Unmarshal(out.Bytes(), &found); err != nil || len(found.Faults) != 9 {
		t.Errorf("got %d faults (%v), want 9:\n%s", len(found.Faults), err, out.String())
	}
}

// faultySite makes the files of everyFault and the tokens.
func faultySite(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	program := filepath.Join(dir, "kmsd-driver-softhsm")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "kmsd/plugins/softhsm").CombinedOutput(); err != nil {
		t.Fatalf("building the driver: %v\n%s", err, out)
	}
	sum, err := config.Sum(program)
	if err != nil {
		t.Fatal(err)
	}
	store := softhsmtest.NewStore(t)
	for _, label := range []string{"good", "one", "twin", "twin", "open", "nopin", "slow", "other"} {
		store.Add(t, label)
	}
	for name, f := range map[string]struct {
		mode os.FileMode
		text string
	}{
		"kmsd.yaml":     {0o600, strings.NewReplacer("$DIR", dir, "$SUM", sum, "$CONF", store.Conf).Replace(everyFault)},
		"pin":           {0o600, softhsmtest.PIN + "\n"},
		"wrong.pin":     {0o600, "wrong-one\n"},
		"open.pin":      {0o644, softhsmtest.PIN + "\n"},
		"domain":        {0o600, strings.Repeat("d", 44) + "\n"},
		"open.domain":   {0o644, strings.Repeat("d", 44) + "\n"},
		"tokens.yaml":   {0o600, fmt.Sprintf("tokens:\n  - {name: a, sha256: %064d, policies: [nobody]}\n", 1)},
		"policies.yaml": {0o600, "policies:\n  app:\n    - {actions: [fly], keys: [\"*\"]}\n"},
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(f.text), f.mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, f.mode); err != nil { // whatever the umask is
			t.Fatal(err)
		}
	}
	return dir
}
