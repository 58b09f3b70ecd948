// Package config answers: what did the operator ask for, and is it sound?
//
// [Load] reads a YAML file, then KMSD_* variables of the environment, then flags;
// the later wins. It reports every fault at once, each with where it stands:
//
//	kmsd.yaml:12: groups[0].members[1].pin.file: mode 0644 lets others read /etc/kmsd/hsm-b.pin; chmod 600 it
//
// Keys that are not known are faults, so that a misspelt limit is never silently
// absent. Relative paths in the file are relative to the file; in variables and
// flags they are relative to the working directory.
//
// Each single value outside of a list can be set by a variable: its keys joined
// with underscores, so tls.cert is KMSD_TLS_CERT. KMSD_LISTEN takes a list with
// commas. KMSD_* variables that mean nothing here are warnings only, because a
// container platform may set some by itself.
package config

import (
	"os"
	"reflect"
	"time"
)

// Config is a sound configuration: what Load returns without an error can be
// used as it is. All paths are absolute. The tag koanf names the key in the file;
// the tag kind marks text that is a path.
type Config struct {
	// Listen is where the API is served: https://HOST:PORT or unix:///PATH.
	Listen []string `koanf:"listen"`
	TLS    TLS      `koanf:"tls"`

	Catalog   Catalog `koanf:"catalog"`
	DriverDir string  `koanf:"driver_dir" kind:"path"`
	Groups    []Group `koanf:"groups"`
	Vault     Vault   `koanf:"vault"`
	Auth      Auth    `koanf:"auth"`
	Audit     Audit   `koanf:"audit"`
	Log       Log     `koanf:"log"`

	// Warnings are worth a line in the log, but stop nothing.
	Warnings []string `koanf:"-"`

	origins origins
	faults  Faults   // that [Inspect] has found
	environ []string // for secrets that are variables

	clientConf string // Chrystoki.conf of Luna members that name none
}

// TLS names PEM files. They are read again when they change.
type TLS struct {
	Cert     string `koanf:"cert" kind:"path"`
	Key      string `koanf:"key" kind:"path"`
	ClientCA string `koanf:"client_ca" kind:"path"` // "" means no client certificates
}

// Catalog says where keys are remembered.
type Catalog struct {
	Bolt Bolt `koanf:"bolt"`
}

// Bolt is a catalog in one file.
type Bolt struct {
	Path string `koanf:"path" kind:"path"`
}

// Group is a group of HSMs that hold the same keys. Zero values mean what they
// mean in kms.GroupConfig.
type Group struct {
	Name           string        `koanf:"name"`
	Domain         Secret        `koanf:"domain"`
	MinCopies      int           `koanf:"min_copies"`
	CommandTimeout time.Duration `koanf:"command_timeout"`
	ProbeInterval  time.Duration `koanf:"probe_interval"`
	Hedge          *bool         `koanf:"hedge"`   // nil means true
	Balance        string        `koanf:"balance"` // cost (default) or count
	Recovery       Recovery      `koanf:"recovery"`
	Members        []Member      `koanf:"members"`

	at string // its path in the configuration
}

// Recovery says how a lost member is brought back.
type Recovery struct {
	Mode     string        `koanf:"mode"` // auto (default) or manual
	Interval time.Duration `koanf:"interval"`
	Retries  *int          `koanf:"retries"` // 0: none, as manual; -1 and nil: no end
}

// Member is one HSM. Settings go to the driver as they are, but for values that
// begin with ./ or ../, which are paths relative to the file.
type Member struct {
	Name     string            `koanf:"name"`
	Driver   string            `koanf:"driver"` // runs DriverDir/kmsd-driver-DRIVER
	SHA256   string            `koanf:"sha256"` // of that program; required outside of dev
	Standby  bool              `koanf:"standby"`
	PIN      Secret            `koanf:"pin"`
	Settings map[string]string `koanf:"settings"`

	at string // its path in the configuration
}

// Same reports whether two entries say the same, wherever they stand.
func (m Member) Same(other Member) bool {
	m.at, other.at = "", ""
	return reflect.DeepEqual(m, other)
}

// Auth names the files that say who may do what.
type Auth struct {
	Tokens   string `koanf:"tokens" kind:"path"`
	Policies string `koanf:"policies" kind:"path"`
}

// Audit says where it is written down who did what.
type Audit struct {
	File string `koanf:"file" kind:"path"`
}

// Log says how much the daemon tells on stderr.
type Log struct {
	Level string `koanf:"level"` // trace, debug, info (default), warn, error
}

// DriverPath returns the program of a driver.
func (cfg *Config) DriverPath(driver string) string {
	return cfg.DriverDir + string(os.PathSeparator) + "kmsd-driver-" + driver
}
