package p11

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// The settings that every PKCS#11 driver knows.
const (
	settingModule = "module"
	settingLabel  = "token_label"
	settingSerial = "token_serial"
	settingUser   = "user" // where there is a choice

	// settingCloning names the protocols that may be used, where there are several: what
	// Luna's documents leave open may turn out to be wrong for one of them.
	settingCloning = "cloning"
)

// settings are a member's settings, checked.
type settings struct {
	module string            // path of the library
	label  string            // CKA_LABEL of the token; "" when chosen by serial alone
	serial string            // serial number of the token; "" when chosen by label alone
	user   uint              // the CKU to log in as
	role   string            // what the settings call it; "" where they do not say
	env    map[string]string // environment variable → value, for the library
	lock   string            // path of the file that keeps drivers apart while they log in; "" for none

	cloning []string // protocols that may be used, the best first; nil: all
}

// target names the token as the settings choose it.
func (s settings) target() string {
	switch {
	case s.serial == "":
		return fmt.Sprintf("with the label %q", s.label)
	case s.label == "":
		return fmt.Sprintf("with the serial number %q", s.serial)
	default:
		return fmt.Sprintf("with the label %q and the serial number %q", s.label, s.serial)
	}
}

// readSettings checks all settings and reports every fault in one error.
func (q Quirks) readSettings(in map[string]string) (settings, error) {
	s := settings{env: map[string]string{}, user: pkcs11.CKU_USER}
	if cku, ok := q.Users[""]; ok {
		s.user = cku
	}
	var faults []error
	for _, name := range slices.Sorted(maps.Keys(in)) {
		value := in[name]
		switch {
		case name == settingModule:
			s.module = value
		case name == settingLabel:
			s.label = value
		case name == settingSerial:
			s.serial = value
		case name == settingUser && q.Users != nil:
			var err error
			s.role = value
			s.user, err = q.findUser(value)
			faults = append(faults, err)
		case name == settingCloning && q.Extend != nil:
			s.cloning = strings.Fields(strings.ReplaceAll(value, ",", " "))
			if len(s.cloning) == 0 {
				faults = append(faults, fmt.Errorf("%s names no protocol", name))
			}
		case q.ConfDirs[name] != ConfDir{}:
			s.env[q.ConfDirs[name].Env] = filepath.Dir(value)
			faults = append(faults, checkFile(name, value), checkBase(name, value, q.ConfDirs[name].File))
		case q.Env[name] != "":
			s.env[q.Env[name]] = value
			faults = append(faults, checkFile(name, value))
		default:
			faults = append(faults, fmt.Errorf("unknown setting %q (known: %s)", name, strings.Join(q.settingNames(), ", ")))
		}
	}
	if s.label == "" && s.serial == "" {
		faults = append(faults, fmt.Errorf("one of %s and %s is required", settingLabel, settingSerial))
	}
	if len(s.label) > maxTokenLabel {
		faults = append(faults, fmt.Errorf("%s is %d bytes long, a token label has at most %d", settingLabel, len(s.label), maxTokenLabel))
	}
	module, err := q.findModule(s.module)
	s.module = module
	if q.Apart != "" {
		if s.lock = in[q.Apart]; s.lock == "" {
			s.lock = module
		}
	}
	if err := errors.Join(append(faults, err)...); err != nil {
		return settings{}, permanent("reading the settings of the member", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return s, nil
}

// maxTokenLabel is the length of CK_TOKEN_INFO.label, PKCS#11 2.40 section 3.2.
const maxTokenLabel = 32

func (q Quirks) settingNames() []string {
	names := slices.AppendSeq([]string{settingModule, settingLabel, settingSerial}, maps.Keys(q.Env))
	names = slices.AppendSeq(names, maps.Keys(q.ConfDirs))
	if q.Users != nil {
		names = append(names, settingUser)
	}
	if q.Extend != nil {
		names = append(names, settingCloning)
	}
	slices.Sort(names)
	return names
}

// findUser returns whom a name logs in.
func (q Quirks) findUser(name string) (uint, error) {
	if cku, ok := q.Users[name]; ok && name != "" {
		return cku, nil
	}
	names := slices.DeleteFunc(slices.Sorted(maps.Keys(q.Users)), func(n string) bool { return n == "" })
	return 0, fmt.Errorf("%s: there is no user %q (known: %s)", settingUser, name, strings.Join(names, ", "))
}

// allowed returns those of a token's protocols that the settings allow, in their order.
func (s settings) allowed(all []pluginproto.CloneProtocol) ([]pluginproto.CloneProtocol, error) {
	if s.cloning == nil {
		return all, nil
	}
	var out []pluginproto.CloneProtocol
	for _, name := range s.cloning {
		if at := slices.IndexFunc(all, func(p pluginproto.CloneProtocol) bool { return p.Name == name }); at >= 0 {
			out = append(out, all[at])
		}
	}
	if len(out) == 0 && len(all) > 0 {
		return nil, permanent("choosing a cloning protocol",
			fmt.Sprintf("%s allows %s, and the token has %s", settingCloning, strings.Join(s.cloning, ", "), protocolNames(all)))
	}
	return out, nil
}

func protocolNames(all []pluginproto.CloneProtocol) string {
	names := make([]string, len(all))
	for i, p := range all {
		names[i] = p.Name
	}
	return strings.Join(names, ", ")
}

// findModule returns the library to load: the one asked for, or the first of the
// known ones that exists.
func (q Quirks) findModule(asked string) (string, error) {
	if asked != "" {
		return asked, checkFile(settingModule, asked)
	}
	for _, path := range q.Modules {
		if checkFile(settingModule, path) == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("no PKCS#11 library at %s: install it or set %s", strings.Join(q.Modules, ", "), settingModule)
}

func checkFile(setting, path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%s: %w", setting, err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: %s is not a file", setting, path)
	}
	return nil
}

// checkBase makes sure of the name of a file that the library looks for in a directory.
func checkBase(setting, path, base string) error {
	if filepath.Base(path) != base {
		return fmt.Errorf("%s: %s is not named %s, and the library reads no other file", setting, path, base)
	}
	return nil
}

// permanent is a member failure that only a person can mend.
func permanent(op, msg string) *pluginproto.Error {
	return &pluginproto.Error{Class: pluginproto.ClassMember, Op: op, Msg: msg, Permanent: true}
}
