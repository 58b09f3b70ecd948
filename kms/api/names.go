package api

import "fmt"

// CheckName returns nil for a name that a key can have, else ErrBadRequest with
// the reason.
func CheckName(name string) error {
	switch {
	case name == "":
		return NewError(CodeBadRequest, "the key has no name", nil)
	case len(name) > MaxNameLen:
		return NewError(CodeBadRequest, fmt.Sprintf("the key's name has %d bytes, at most %d are allowed", len(name), MaxNameLen), nil)
	case name[0] == '.' || name[0] == '-':
		return NewError(CodeBadRequest, "a key's name does not start with a dot or a dash", nil)
	}
	for i := range len(name) {
		if !nameByte(name[i]) {
			return NewError(CodeBadRequest, fmt.Sprintf("a key's name has only a-z A-Z 0-9 . _ -, not %q", name[i:i+1]), nil)
		}
	}
	return nil
}

func nameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '_' || c == '-'
}
