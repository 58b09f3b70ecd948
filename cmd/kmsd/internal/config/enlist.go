package config

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"kmsd/cmd/kmsd/internal/owned"
	"kmsd/kms"
	"kmsd/kms/api"
)

// fileWay is what whoever is refused here can do: what the file says was decided by
// somebody who may run programs on this host anyway.
const fileWay = "; put the member into kmsd.yaml and reload kmsd"

// Enlist turns the description of a member that comes over the API into its
// configuration, or refuses it. Whoever may change a group must not come to run
// programs of their own with that, nor have any file read: driver and library have to be
// ones that the configuration uses already, the driver is the program whose SHA-256 is
// there, and the PIN and whatever else is a file lies beside that of a configured
// member, as closed to others as that. All faults are reported at once. That no two members have
// the same token is found out by the token's serial number, when it is connected.
func (cfg *Config) Enlist(_ string, spec api.MemberSpec) (kms.MemberConfig, error) {
	m := Member{Name: spec.Name, Driver: spec.Driver, SHA256: spec.SHA256, Standby: spec.Standby, PIN: Secret{File: spec.PIN.File}, Settings: maps.Clone(spec.Settings)}
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if !namePattern.MatchString(m.Name) {
		fault("name: %q is not a name; use a-z 0-9 . _ -, at most 63, beginning with a letter or digit", m.Name)
	}
	if kin := cfg.membersWith(func(o Member) bool { return o.Driver == m.Driver }); len(kin) == 0 {
		fault("driver: no member of the configuration uses %q%s", m.Driver, fileWay)
	} else if err := cfg.sumOf(&m, kin[0]); err != nil {
		faults = append(faults, err)
	}
	if module := m.Settings["module"]; module != "" && len(cfg.membersWith(func(o Member) bool { return o.Settings["module"] == module })) == 0 {
		fault("settings.module: no member of the configuration uses %s%s", module, fileWay)
	}
	for _, name := range slices.Sorted(maps.Keys(m.Settings)) {
		if err := cfg.checkSettingFile(name, m.Settings[name]); err != nil {
			faults = append(faults, err)
		}
	}
	if err := cfg.checkPINFile(m.PIN.File); err != nil {
		faults = append(faults, err)
	}
	if faults == nil { // else the Chrystoki.conf may be one that must not be read
		found, _ := cfg.review(m) // a file that cannot be read is the driver's to report
		for _, f := range found {
			if f.Wrong {
				fault("settings.%s: %s", f.Setting, f.Text)
			}
		}
	}
	if faults != nil {
		return kms.MemberConfig{}, fmt.Errorf("member %s is refused: %s", m.Name, strings.ReplaceAll(errors.Join(faults...).Error(), "\n", "; "))
	}
	return cfg.member(m), nil
}

// membersWith returns the members of the file, of all groups, that are as asked.
func (cfg *Config) membersWith(is func(Member) bool) []Member {
	var found []Member
	for _, g := range cfg.Groups {
		for _, m := range g.Members {
			if is(m) {
				found = append(found, m)
			}
		}
	}
	return found
}

// sumOf gives a member the SHA-256 of a driver that the file trusts, unless it names
// it itself, and refuses another.
func (cfg *Config) sumOf(m *Member, kin Member) error {
	switch {
	case m.SHA256 == "":
		m.SHA256 = kin.SHA256
	case kin.SHA256 != "" && !strings.EqualFold(m.SHA256, kin.SHA256):
		return fmt.Errorf("sha256: the configuration trusts another program as driver %s, with SHA-256 %s%s", m.Driver, kin.SHA256, fileWay)
	}
	path := cfg.DriverPath(m.Driver)
	have, err := Sum(path)
	switch {
	case err != nil:
		return fmt.Errorf("driver: %w", err)
	case m.SHA256 != "" && !strings.EqualFold(m.SHA256, have):
		return fmt.Errorf("sha256: %s is another program: its SHA-256 is %s", path, have)
	}
	return nil
}

// checkSettingFile refuses a setting that names a file out of the way, or one that
// others may change: it may say what a library loads.
func (cfg *Config) checkSettingFile(name, path string) error {
	if name == "module" || !strings.ContainsRune(path, filepath.Separator) {
		return nil
	}
	beside := func(o Member) bool { return filepath.Dir(o.Settings[name]) == filepath.Dir(path) }
	if !filepath.IsAbs(path) || filepath.Clean(path) != path {
		return fmt.Errorf("settings.%s: %q is not a clean absolute path", name, path)
	}
	if len(cfg.membersWith(beside)) == 0 {
		return fmt.Errorf("settings.%s: no member of the configuration has its %s in %s; put the file beside those, or the member into kmsd.yaml and reload kmsd",
			name, name, filepath.Dir(path))
	}
	switch info, err := os.Lstat(path); {
	case err != nil:
		return fmt.Errorf("settings.%s: %w", name, plain(err))
	case !info.Mode().IsRegular() && !info.IsDir():
		return fmt.Errorf("settings.%s: %s is neither a file nor a directory", name, path)
	case !owned.ByUs(info) || info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("settings.%s: others may change %s; chown it to the user of kmsd and chmod 600 it", name, path)
	}
	return nil
}

// checkPINFile refuses a file that is no PIN's: one out of the way, or open to others.
func (cfg *Config) checkPINFile(path string) error {
	switch {
	case path == "":
		return errors.New("pin.file: missing; it is the path of a file on the host of kmsd")
	case !filepath.IsAbs(path) || filepath.Clean(path) != path:
		return fmt.Errorf("pin.file: %q is not a clean absolute path", path)
	case len(cfg.membersWith(func(o Member) bool { return o.PIN.File != "" && filepath.Dir(o.PIN.File) == filepath.Dir(path) })) == 0:
		return fmt.Errorf("pin.file: no member of the configuration has its PIN in %s; put the file beside those, or the member into kmsd.yaml and reload kmsd", filepath.Dir(path))
	case len(cfg.secretFiles(path)) > 0:
		return fmt.Errorf("pin.file: %s holds something else: it is %s", path, cfg.secretFiles(path)[0])
	}
	b, err := Secret{File: path}.read(context.Background(), nil)
	clear(b)
	if err != nil {
		return fmt.Errorf("pin.file: %w", err)
	}
	return nil
}

// secretFiles says what a file is, when it is a secret of kmsd's other than a PIN.
func (cfg *Config) secretFiles(path string) []string {
	var is []string
	for what, file := range map[string]string{
		"the key of the TLS certificate": cfg.TLS.Key, "the file of access tokens": cfg.Auth.Tokens,
		"the audit log": cfg.Audit.File, "the catalog": cfg.Catalog.Bolt.Path,
	} {
		if file == path {
			is = append(is, what)
		}
	}
	for _, g := range cfg.Groups {
		if g.Domain.File == path {
			is = append(is, "the domain secret of group "+g.Name)
		}
	}
	return is
}
