package luna_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kmsd/plugins/luna/lunasim"
)

// No byte of a key and no PIN comes to be in a log, a catalog or another file of kmsd's,
// whatever fails, at the most talkative level.
func TestKeysAndPINsStayWhereTheyAre(t *testing.T) {
	s := newSite(t)
	for _, name := range []string{"hsm-a", "hsm-b", "hsm-c"} {
		s.members = append(s.members, on(name, lunasim.New(t, lunasim.Options{})))
	}
	s.top = map[string]any{"log": map[string]any{"level": "trace"}}
	s.serve()
	s.awaitWhole()
	for name, kind := range map[string]string{"shop": "", "signer": "ec-p256", "cards": "rsa-2048", "mac": "hmac-sha256"} {
		s.create(name, kind)
	}
	s.works("shop")
	// What fails says more than what works.
	b, c := s.members[1].partition, s.members[2].partition
	lost := b.Arm(lunasim.Fault{What: lunasim.Lose, Function: "CA_Insert", Arg: 0x30})
	_, _ = s.c.Rotate(t.Context(), "shop") // may fail
	lost.Disarm()
	c.Set("domain", "blue")
	_, _ = s.c.Rotate(t.Context(), "cards") // may fail
	c.Set("domain", "red")
	kill(t, s.now("hsm-c").DriverPID)
	s.awaitWhole()
	secrets := formsOf(c.KeyBytes(t))
	for _, pin := range []string{c.PIN, c.CUPIN} {
		secrets = append(secrets, []byte(pin), []byte(hex.EncodeToString([]byte(pin))), []byte(base64.StdEncoding.EncodeToString([]byte(pin))))
	}
	files := 0
	err := filepath.WalkDir(filepath.Dir(s.dir), func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || strings.HasSuffix(path, ".pin") {
			return err
		}
		files++
		text, err := os.ReadFile(path)
		searchFor(t, path, text, secrets)
		return err
	})
	if err != nil || files < 3 {
		t.Errorf("%d files searched, %v", files, err)
	}
}

// formsOf are the ways in which keys may be written down by accident.
func formsOf(keys map[string][]byte) (forms [][]byte) {
	for _, value := range keys {
		whole := value[:len(value)/3*3] // of base64 the part that is the same whatever follows
		forms = append(forms, value, []byte(hex.EncodeToString(value)), []byte(base64.StdEncoding.EncodeToString(whole)))
	}
	return forms
}

func searchFor(t *testing.T, where string, text []byte, secrets [][]byte) {
	t.Helper()
	for i, secret := range secrets {
		if bytes.Contains(text, secret) {
			t.Errorf("secret %d is in %s", i, where)
		}
	}
}
