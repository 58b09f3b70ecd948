package api

import "fmt"

// CheckName returns nil for a name that a key can have, else ErrBadRequest with
// the reason.
func CheckName(name string) error { return checkName("key", name) }

// CheckDatabaseName is CheckName for databases, whose names are as those of keys.
func CheckDatabaseName(name string) error { return checkName("database", name) }

func checkName(what, name string) error {
	bad := func(format string, args ...any) error {
		return NewError(CodeBadRequest, fmt.Sprintf(format, args...), nil)
	}
	switch {
	case name == "":
		return bad("the %s has no name", what)
	case len(name) > MaxNameLen:
		return bad("the %s's name has %d bytes, at most %d are allowed", what, len(name), MaxNameLen)
	case name[0] == '.' || name[0] == '-':
		return bad("a %s's name does not start with a dot or a dash", what)
	}
	for i := range len(name) {
		if !nameByte(name[i]) {
			return bad("a %s's name has only a-z A-Z 0-9 . _ -, not %q", what, name[i:i+1])
		}
	}
	return nil
}

func nameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '_' || c == '-'
}
