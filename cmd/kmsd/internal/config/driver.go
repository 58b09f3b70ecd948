package config

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
)

// Sum returns the SHA-256 of a program, in hexadecimal, after a look at whether it
// can be run and whether just anybody could replace it.
func Sum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", plain(err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return "", plain(err)
	case !info.Mode().IsRegular():
		return "", fmt.Errorf("%s is not a regular file", path)
	case info.Mode().Perm()&0o111 == 0:
		return "", fmt.Errorf("%s is not executable; chmod 755 it", path)
	case info.Mode().Perm()&0o002 != 0:
		return "", fmt.Errorf("mode %04o lets anybody replace %s; chmod 755 it", info.Mode().Perm(), path)
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", plain(err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// checkProgram tells whether the program of a secret can be run.
func checkProgram(name string) error {
	_, err := exec.LookPath(name)
	return err
}
