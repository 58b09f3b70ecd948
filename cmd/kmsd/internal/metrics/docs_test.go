package metrics_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"kmsd/kms/api"
)

// docs are what operators read and paste.
const docs = "../../../../docs"

// golden are the names of all metrics, and for histograms those of their parts.
func golden(t *testing.T) (names, withParts []string) {
	t.Helper()
	b, err := os.ReadFile("testdata/names.txt")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		names = append(names, f[0])
		withParts = append(withParts, f[0])
		if f[1] == "histogram" {
			withParts = append(withParts, f[0]+"_bucket", f[0]+"_count", f[0]+"_sum")
		}
	}
	return names, withParts
}

var (
	metricName = regexp.MustCompile(`\bkmsd_[a-z0-9_]+`)
	labelled   = regexp.MustCompile(`(\w+)=~?"([^"]*)"`)
)

// rules is a file of Prometheus rules.
type rules struct {
	Groups []struct {
		Name  string
		Rules []rule
	}
}

type rule struct {
	Alert, Expr, For    string
	Labels, Annotations map[string]string
}

func readRules(t *testing.T) []rule {
	t.Helper()
	f, err := os.Open(filepath.Join(docs, "alerts.yml"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var file rules
	d := yaml.NewDecoder(f)
	d.KnownFields(true)
	if err := d.Decode(&file); err != nil {
		t.Fatal(err)
	}
	return file.Groups[0].Rules
}

// vocabulary is what a label's value in a rule may be.
var vocabulary = map[string][]string{
	"state": {
		string(api.GroupNormal), string(api.GroupDegraded), string(api.GroupSole), string(api.GroupStandbyServing), string(api.GroupLost),
		string(api.MemberActive), string(api.MemberStandby), string(api.MemberProbing), string(api.MemberSyncing),
		string(api.MemberDraining), string(api.MemberDown), string(api.MemberFailed),
	},
	"operation": {"wrap", "unwrap", "rewrap", "datakey"},
	"outcome":   codes(),
}

func codes() []string {
	all := []string{"ok"}
	for _, c := range api.Codes() {
		all = append(all, string(c))
	}
	return all
}

// An alert on a name that does not exist never fires, and nobody notices.
func TestAlertsNameWhatExists(t *testing.T) {
	_, names := golden(t)
	for _, r := range readRules(t) {
		found := metricName.FindAllString(r.Expr, -1)
		if len(found) == 0 {
			t.Errorf("%s is about no metric", r.Alert)
		}
		for _, name := range found {
			if !slices.Contains(names, name) {
				t.Errorf("%s names %s, which does not exist", r.Alert, name)
			}
		}
		for _, m := range labelled.FindAllStringSubmatch(r.Expr, -1) {
			for value := range strings.SplitSeq(m[2], "|") {
				if !slices.Contains(vocabulary[m[1]], value) {
					t.Errorf("%s: label %s is never %q", r.Alert, m[1], value)
				}
			}
		}
		if open, shut := strings.Count(r.Expr, "("), strings.Count(r.Expr, ")"); open != shut {
			t.Errorf("%s opens %d parentheses and closes %d", r.Alert, open, shut)
		}
		if s := r.Labels["severity"]; s != "page" && s != "ticket" {
			t.Errorf("%s has severity %q", r.Alert, s)
		}
		if r.Annotations["summary"] == "" {
			t.Errorf("%s has no summary", r.Alert)
		}
	}
}

func TestTheManualHasEveryMetricAndAlertAndNoOther(t *testing.T) {
	names, withParts := golden(t)
	b, err := os.ReadFile(filepath.Join(docs, "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	manual := string(b)
	for _, name := range names {
		if !strings.Contains(manual, "`"+name) {
			t.Errorf("the manual lacks %s", name)
		}
	}
	for _, name := range metricName.FindAllString(manual, -1) {
		if !slices.Contains(withParts, name) {
			t.Errorf("the manual names %s, which does not exist", name)
		}
	}
	for _, r := range readRules(t) {
		if !strings.Contains(manual, r.Alert) {
			t.Errorf("the manual lacks the alert %s", r.Alert)
		}
	}
}
