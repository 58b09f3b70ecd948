package chrystoki_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"kmsd/cmd/kmsd/internal/chrystoki"
)

const reviewed = `VirtualToken = {
   VirtualToken00Label = payments;
   VirtualToken00SN = 1100;
   VirtualToken00Members = 100, 101;
   VirtualToken00StandbyMembers = 102;
}
`

func TestReview(t *testing.T) {
	const haOnly, appID = "HAConfiguration = { HAOnly = 1; }\n", "Misc = { AppIdMajor = 7; }\n"
	for _, c := range []struct {
		name, text string
		choice     chrystoki.Choice
		wrong      string   // the setting that is at fault, "" when none is
		want       []string // how the findings begin and go on
	}{
		{"a client without HA", "Chrystoki2 = { LibUNIX64 = /x; }", chrystoki.Choice{Label: "hsm-a"}, "", nil},
		{"HAOnly hides the token", haOnly, chrystoki.Choice{Serial: "200"}, "", []string{"x.conf:1: HAConfiguration.HAOnly hides the physical slots|give kmsd a copy"}},
		{"HAOnly that is off", "HAConfiguration = { HAOnly = 0; }", chrystoki.Choice{Serial: "200"}, "", nil},
		{"a fixed application id", appID, chrystoki.Choice{Serial: "200"}, "", []string{"x.conf:1: Misc.AppIdMajor is fixed|share one login"}},
		{"the partition is a member", reviewed, chrystoki.Choice{Serial: "101"}, "",
			[]string{`x.conf:4: partition 101 is in the Luna HA group "payments"|two HA implementations must not manage one partition`}},
		{"the partition is a standby member", reviewed, chrystoki.Choice{Serial: "102"}, "", []string{`x.conf:5: partition 102 is in the Luna HA group "payments"|hagroup removemember`}},
		{"the partition is another's", reviewed, chrystoki.Choice{Serial: "200"}, "", []string{`x.conf:2: the file has the Luna HA group "payments", without partition 200|give kmsd a copy`}},
		{"which partition it is cannot be told", reviewed, chrystoki.Choice{Label: "hsm-a"}, "", []string{`x.conf:2: the file has the Luna HA group "payments"|choose the token by token_serial`}},
		{"the serial number of the virtual slot", reviewed + haOnly, chrystoki.Choice{Serial: "1100"}, "token_serial",
			[]string{`x.conf:3: that is the virtual slot of the Luna HA group "payments"|choose a partition by token_serial; its members are 100, 101, 102`}},
		{"the label of the virtual slot", reviewed + appID, chrystoki.Choice{Label: "payments"}, "token_label", []string{`x.conf:2: that is the virtual slot of the Luna HA group "payments"|`}},
		{"a partition that is called as its group", reviewed, chrystoki.Choice{Label: "payments", Serial: "100"}, "", []string{"x.conf:4: partition 100 is in|"}},
		{"everything", reviewed + haOnly + appID, chrystoki.Choice{Serial: "100"}, "",
			[]string{"x.conf:7: HAConfiguration.HAOnly|", "x.conf:4: partition 100|", "x.conf:8: Misc.AppIdMajor|"}},
		{"groups that have no label", "VirtualToken = { VirtualToken03Members = 1; VirtualToken04Members = 2; }", chrystoki.Choice{Serial: "9"}, "",
			[]string{"x.conf:1: the file has the Luna HA groups number 03, number 04|"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := parse(t, c.text).Review(c.choice)
			if len(got) != len(c.want) {
				t.Fatalf("got %+v, want %q", got, c.want)
			}
			for i, want := range c.want {
				begin, more, _ := strings.Cut(want, "|")
				if !strings.HasPrefix(got[i].Text, begin) || !strings.Contains(got[i].Text, more) {
					t.Errorf("got %q, want %q", got[i].Text, want)
				}
				if got[i].Wrong != (c.wrong != "") || c.wrong != "" && got[i].Setting != c.wrong {
					t.Errorf("got %+v, want a fault of %q", got[i], c.wrong)
				}
			}
		})
	}
}

// checkTranslation wants the YAML of a translation to be YAML, and to say what the
// translation does.
func checkTranslation(t *testing.T, f *chrystoki.File) {
	t.Helper()
	tr, err := f.Translate()
	if err != nil {
		return
	}
	var text bytes.Buffer
	if err := tr.WriteYAML(&text); err != nil {
		t.Fatal(err)
	}
	var back chrystoki.Translation
	if err := yaml.Unmarshal(text.Bytes(), &back); err != nil {
		t.Fatalf("%v\n%s", err, text.String())
	}
	same := func(a, b chrystoki.GroupEntry) bool {
		return a.Name == b.Name && a.CommandTimeout == b.CommandTimeout && slices.Equal(a.Members, b.Members)
	}
	if !slices.EqualFunc(tr.Groups, back.Groups, same) {
		t.Errorf("got %+v, want %+v", back.Groups, tr.Groups)
	}
}
