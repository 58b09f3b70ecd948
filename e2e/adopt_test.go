package e2e_test

import (
	"bytes"
	"fmt"
	"testing"

	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// Somebody else's program makes a key on the token of one member, while kmsd has it
// open too.
func TestAKeyThatSomebodyElseHasMadeIsAdopted(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	g := group(t, c)
	members := g.Members
	other := openToken(t, configOf(t, s), members[0].Name)
	made, err := other.Generate(t.Context(), pluginproto.KeySpec{ID: pluginproto.KeyID{1, 2, 3}, Type: pluginproto.AES256, Label: "till"})
	if err != nil {
		t.Fatal(err)
	}
	report, err := c.Sync(t.Context(), g.Name, api.SyncOptions{})
	if err != nil || len(report.Members[0].Foreign) != 1 || report.Members[0].Foreign[0].Identity != made.ID.String() {
		t.Fatalf("the key is not reported: %+v, %v", report, err)
	}
	report, err = c.Sync(t.Context(), g.Name, api.SyncOptions{Adopt: true})
	if err != nil || fmt.Sprint(report.Adopted) != "[till]" {
		t.Fatalf("the key is not adopted: %+v, %v", report, err)
	}
	v, err := c.Verify(t.Context(), "till")
	if err != nil || !v.OK || len(v.Copies) != len(members) {
		t.Errorf("it does not verify: %+v, %v", v, err)
	}
	plain := []byte("a data key")
	for range 10 { // every member has its turn
		wrapped := wrap(t, c, "till", plain, nil)
		if got, err := c.Unwrap(t.Context(), "till", wrapped, nil); err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("unwrapped %q, %v", got, err)
		}
	}
	check, err := c.Check(t.Context(), g.Name)
	if err != nil || !check.OK {
		t.Errorf("the group is not sound after that: %+v, %v", check, err)
	}
}
