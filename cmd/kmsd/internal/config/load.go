package config

import (
	"cmp"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"

	"github.com/knadh/koanf/providers/confmap"
	"github.com/knadh/koanf/providers/env/v2"
	"github.com/knadh/koanf/providers/posflag"
	"github.com/knadh/koanf/v2"
	"github.com/spf13/pflag"

	"kmsd/cmd/kmsd/internal/chrystoki"
	"kmsd/cmd/kmsd/internal/owned"
)

// Options are what a configuration depends on beside its file.
type Options struct {
	// Environ holds NAME=value. Nil means the environment of the process.
	Environ []string
	// Flags that were set override the rest; see AddFlags. Nil means none.
	Flags *pflag.FlagSet
	// Dev lets a member do without the SHA-256 of its driver.
	Dev bool
	// Modules makes a library that a setting names and that is not there a fault. A
	// server leaves that to its driver, and serves with the other members.
	Modules bool
	// ClientConf is the Chrystoki.conf of Luna members that name none. "" means
	// chrystoki.DefaultPath.
	ClientConf string
}

// Variables of the command line client and of kmsd dev. They share the prefix but
// configure no server.
func clientVariables() []string {
	return []string{"KMSD_ADDR", "KMSD_CACERT", "KMSD_CERT", "KMSD_KEY", "KMSD_TOKEN", "KMSD_VAULT_ADDR", "KMSD_VAULT_TOKEN"}
}

// AddFlags defines the flags that override a configuration.
func AddFlags(fs *pflag.FlagSet) {
	fs.StringSlice("listen", nil, "serve here: https://HOST:PORT or unix:///PATH (repeatable; overrides listen)")
	fs.String("driver-dir", "", "directory of the driver programs (overrides driver_dir)")
	fs.String("log-level", "", "trace, debug, info, warn or error (overrides log.level)")
}

// flagKeys says which key each flag of AddFlags overrides.
func flagKeys() map[string]string {
	return map[string]string{"listen": "listen", "driver-dir": "driver_dir", "log-level": "log.level"}
}

// Load reads and checks a configuration. An error of type Faults lists all that is
// wrong with it; any other means that the file could not be read at all.
func Load(path string, opts Options) (*Config, error) {
	cfg, err := Inspect(path, opts)
	if err != nil {
		return nil, err
	}
	return cfg, nil
}

// Inspect is Load for those who look for faults: with an error of type Faults it
// also returns the configuration, as far as it can be read, or nil. It must not be
// used but for [Config.Sound] and to say where further faults are.
func Inspect(path string, opts Options) (*Config, error) {
	text, info, err := readConfig(path)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w", plain(err))
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("finding the directory of the configuration: %w", err)
	}
	if opts.Environ == nil {
		opts.Environ = os.Environ()
	}
	cfg, c := decode(path, text, opts)
	switch { // it names programs that are run
	case info.Mode().Perm()&0o002 != 0:
		c.add("", "mode %04o lets anybody change it; chmod 600 it", info.Mode().Perm())
	case !owned.ByUs(info):
		c.add("", "it belongs to another user; %s", owned.Advice(info))
	}
	if cfg != nil {
		resolve(reflect.ValueOf(cfg).Elem(), dir)
		cfg.check(c, opts)
	}
	err = c.err()
	if cfg != nil {
		cfg.origins, cfg.faults = c.origins, c.faults
	}
	return cfg, err
}

// readConfig reads a file, and looks at the one that it has read: the name may be
// another's in the next moment.
func readConfig(path string) (_ []byte, _ fs.FileInfo, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would block
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	return text, info, err
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxFile+1))
}

// decode lays environment and flags over the text of a file. The collector holds
// what was wrong; the configuration is nil when nothing of it is left to look at.
func decode(name string, text []byte, opts Options) (*Config, *collector) {
	c := &collector{origins: origins{file: name, at: map[string]origin{}}}
	values := c.parse(text)
	if values == nil && len(c.faults) > 0 {
		return nil, c
	}
	cfg := &Config{environ: slices.Clone(opts.Environ), clientConf: cmp.Or(opts.ClientConf, chrystoki.DefaultPath)}
	k := koanf.New(".")
	vars := c.variables(opts.Environ, &cfg.Warnings)
	layers := []koanf.Provider{confmap.Provider(values, ""), vars}
	if opts.Flags != nil {
		layers = append(layers, c.flags(opts.Flags, k))
	}
	for _, layer := range layers {
		if err := k.Load(layer, nil); err != nil {
			c.add("", "%v", err)
		}
	}
	if err := k.Unmarshal("", cfg); err != nil {
		c.add("", "%v", err)
	}
	for i := range cfg.Groups {
		g := &cfg.Groups[i]
		g.at = fmt.Sprintf("groups[%d]", i)
		for j := range g.Members {
			g.Members[j].at = fmt.Sprintf("%s.members[%d]", g.at, j)
		}
	}
	checkSecretVariables(cfg)
	return cfg, c
}

// leaf is a value that can be set from outside of the file.
type leaf struct {
	path string
	typ  reflect.Type
	kind string // "path" or ""
}

// leaves returns the values outside of lists of structs and of maps. :: variable → leaf
func leaves(t reflect.Type, path string, out map[string]leaf) map[string]leaf {
	for f := range fields(t) {
		at := join(path, f.Tag.Get("koanf"))
		switch {
		case f.Type.Kind() == reflect.Struct:
			leaves(f.Type, at, out)
		case f.Type.Kind() == reflect.Map, f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() != reflect.String:
		default:
			name := "KMSD_" + strings.ToUpper(strings.ReplaceAll(at, ".", "_"))
			out[name] = leaf{path: at, typ: f.Type, kind: f.Tag.Get("kind")}
		}
	}
	return out
}

// variables is the layer of the environment. Names that mean nothing are added to
// unknown.
func (c *collector) variables(environ []string, unknown *[]string) koanf.Provider {
	known := leaves(reflect.TypeFor[Config](), "", map[string]leaf{})
	return env.Provider(".", env.Opt{
		Prefix:      "KMSD_",
		EnvironFunc: func() []string { return environ },
		TransformFunc: func(name, text string) (string, any) {
			l, ok := known[name]
			if !ok {
				if !slices.Contains(clientVariables(), name) {
					*unknown = append(*unknown, name)
				}
				return "", nil
			}
			c.note(l.path, origin{name: name})
			if l.typ.Kind() == reflect.Slice {
				return l.path, strings.Split(text, ",")
			}
			v, err := scalar(text, l.typ)
			if err != nil {
				c.add(l.path, "%v", err)
				return "", nil
			}
			return l.path, absolute(l, v)
		},
	})
}

// flags is the layer of the command line.
func (c *collector) flags(fs *pflag.FlagSet, k *koanf.Koanf) koanf.Provider {
	known := slices.Collect(maps.Values(leaves(reflect.TypeFor[Config](), "", map[string]leaf{})))
	keys := flagKeys()
	return posflag.ProviderWithFlag(fs, ".", k, func(f *pflag.Flag) (string, any) {
		path, ok := keys[f.Name]
		if !ok || !f.Changed {
			return "", nil
		}
		c.note(path, origin{name: "--" + f.Name})
		i := slices.IndexFunc(known, func(l leaf) bool { return l.path == path })
		return path, absolute(known[i], posflag.FlagVal(fs, f))
	})
}

// absolute makes a path from outside of the file absolute.
func absolute(l leaf, v any) any {
	text, ok := v.(string)
	if !ok || l.kind != "path" || text == "" {
		return v
	}
	if abs, err := filepath.Abs(text); err == nil {
		return abs
	}
	return v
}

// resolve makes the paths of a file absolute, relative to its directory.
func resolve(v reflect.Value, dir string) {
	for f := range fields(v.Type()) {
		fv := v.FieldByIndex(f.Index)
		switch {
		case f.Tag.Get("kind") == "path":
			fv.SetString(within(dir, fv.String()))
		case fv.Kind() == reflect.Struct:
			resolve(fv, dir)
		case fv.Kind() == reflect.Slice && fv.Type().Elem().Kind() == reflect.Struct:
			for i := range fv.Len() {
				resolve(fv.Index(i), dir)
			}
		case fv.Kind() == reflect.Map && fv.Type().Elem().Kind() == reflect.String:
			for key, val := range fv.Seq2() {
				if s := val.String(); strings.HasPrefix(s, "./") || strings.HasPrefix(s, "../") {
					fv.SetMapIndex(key, reflect.ValueOf(within(dir, s)))
				}
			}
		}
	}
}

func within(dir, path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// checkSecretVariables turns the names of unknown variables into warnings, but for
// those that are somebody's secret.
func checkSecretVariables(cfg *Config) {
	secret := map[string]bool{}
	for _, g := range cfg.Groups {
		secret[g.Domain.Env] = true
		for _, m := range g.Members {
			secret[m.PIN.Env] = true
		}
	}
	names := cfg.Warnings
	cfg.Warnings = nil
	for _, name := range slices.Sorted(slices.Values(names)) {
		if !secret[name] {
			cfg.Warnings = append(cfg.Warnings, "the variable "+name+" sets nothing that kmsd knows")
		}
	}
}
