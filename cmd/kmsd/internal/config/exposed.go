package config

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// warnOfExposed tells of the files in a member's settings that just anybody could replace:
// the library, and what says which HSM it talks to. The driver gives them the PIN.
func (cfg *Config) warnOfExposed(c *collector, at string, m Member) {
	for _, name := range slices.Sorted(maps.Keys(m.Settings)) {
		path := m.Settings[name]
		if !filepath.IsAbs(path) {
			continue
		}
		if text := exposed(path); text != "" {
			cfg.warn(c, at+".settings."+name, m, text)
		}
	}
}

// exposed says how anybody could replace a file, "" when nobody could or there is none. In a
// directory with the sticky bit, as /tmp, it takes the file's owner.
func exposed(path string) string {
	const then = "and with it what the driver gives the PIN to: chmod o-w %s"
	dir := filepath.Dir(path)
	if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o002 != 0 {
		return fmt.Sprintf("mode %04o lets anybody change %s, "+then, info.Mode().Perm(), path, path)
	}
	if info, err := os.Stat(dir); err == nil && info.Mode().Perm()&0o002 != 0 && info.Mode()&fs.ModeSticky == 0 {
		return fmt.Sprintf("mode %04o of its directory lets anybody replace %s, "+then, info.Mode().Perm(), path, dir)
	}
	return ""
}
