package kms

import (
	"encoding/hex"
	"strings"
	"testing"
)

// Envelopes that exist are bound to these bytes. They are never written anew: another
// form gets another domain, and what is bound to this one stays readable.
func TestWhatDataKeysAreBoundToNeverChanges(t *testing.T) {
	const domain = "6b6d73642064617461206b6579203100" // "kmsd data key 1" and a zero byte
	for _, c := range []struct {
		database, id string
		version      int
		object       bool
		want         string
	}{
		{"shop", "1", 1, false, domain + "0473686f70" + "0131" + "00000001" + "00"},
		{"shop", "1", 1, true, domain + "0473686f70" + "0131" + "00000001" + "01"},
		{"shop", "1", 100_000, false, domain + "0473686f70" + "0131" + "000186a0" + "00"},
		{"s", "hop\x001", 2, false, domain + "0173" + "05686f700031" + "00000002" + "00"},
		{"shop", strings.Repeat("\xff", 255), 1, false, domain + "0473686f70" + "ff" + strings.Repeat("ff", 255) + "00000001" + "00"},
	} {
		if got := hex.EncodeToString(dataKeyAAD(c.database, c.id, c.version, c.object)); got != c.want {
			t.Errorf("version %d of %q in %q is bound to\n%s, want\n%s", c.version, c.id, c.database, got, c.want)
		}
	}
}
