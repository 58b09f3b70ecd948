package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"strings"
)

// A token is kmsd_ and 32 random bytes in base64url. The prefix lets secret
// scanners find one that was published. Because a token is random, a plain SHA-256
// of it is enough in the file: there is nothing to guess.
const (
	tokenPrefix = "kmsd_"
	tokenBytes  = 32
)

// NewToken makes a token and the hash that stands for it in the file.
func NewToken() (token, hash string) {
	var b [tokenBytes]byte
	_, _ = rand.Read(b[:]) // never fails; crypto/rand ends the process instead
	token = tokenPrefix + base64.RawURLEncoding.EncodeToString(b[:])
	sum := sha256.Sum256([]byte(token))
	return token, hex.EncodeToString(sum[:])
}

// wellFormed keeps short and chosen tokens out, whatever hash is in the file.
func wellFormed(token string) bool {
	text, ok := strings.CutPrefix(token, tokenPrefix)
	if !ok || len(text) != base64.RawURLEncoding.EncodedLen(tokenBytes) {
		return false
	}
	_, err := base64.RawURLEncoding.DecodeString(text)
	return err == nil
}
