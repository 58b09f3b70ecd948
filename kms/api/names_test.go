package api_test

import (
	"errors"
	"strings"
	"testing"

	"kmsd/kms/api"
)

func TestCheckName(t *testing.T) {
	for _, name := range []string{"a", "shop", "shop-1", "Shop_1.eu", "_x", "0", strings.Repeat("n", api.MaxNameLen)} {
		if err := api.CheckName(name); err != nil {
			t.Errorf("CheckName(%q) = %v, want nil", name, err)
		}
	}
	for name, text := range map[string]string{
		"":                                    "the key has no name",
		strings.Repeat("n", api.MaxNameLen+1): "the key's name has 129 bytes, at most 128 are allowed",
		".":                                   "a key's name does not start with a dot or a dash",
		"..":                                  "a key's name does not start with a dot or a dash",
		"-rf":                                 "a key's name does not start with a dot or a dash",
		"a/b":                                 `a key's name has only a-z A-Z 0-9 . _ -, not "/"`,
		"a b":                                 `a key's name has only a-z A-Z 0-9 . _ -, not " "`,
		"a\x00":                               `a key's name has only a-z A-Z 0-9 . _ -, not "\x00"`,
		"caf\u00e9":                           `a key's name has only a-z A-Z 0-9 . _ -, not "\xc3"`,
		"shop*":                               `a key's name has only a-z A-Z 0-9 . _ -, not "*"`,
	} {
		err := api.CheckName(name)
		if !errors.Is(err, api.ErrBadRequest) || err.Error() != text {
			t.Errorf("CheckName(%q) = %v, want bad_request: %s", name, err, text)
		}
	}
}
