package config

import (
	"errors"
	"io/fs"

	"kmsd/cmd/kmsd/internal/chrystoki"
)

// lunaDriver is the driver whose library reads a Chrystoki.conf.
const lunaDriver = "luna"

// checkChrystoki looks at what else the library of a Luna member reads. Luna HA groups
// there are a warning, because most of them belong to other programs; a member that is
// such a group is a fault.
func (cfg *Config) checkChrystoki(c *collector, at string, m Member, opts Options) {
	found, err := cfg.review(m)
	switch {
	case errors.Is(err, fs.ErrNotExist) && opts.Modules:
		c.check(at+".settings.chrystoki_conf", "%v", plain(err))
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		cfg.warn(c, at+".settings.chrystoki_conf", m, plain(err).Error()+"; so nobody has looked for Luna HA groups in it")
	}
	for _, f := range found {
		path := at + ".settings." + f.Setting
		if f.Wrong {
			c.check(path, "%s", f.Text)
		} else {
			cfg.warn(c, path, m, f.Text)
		}
	}
}

// review reads the Chrystoki.conf of a member. A member that names none, on a machine
// that has none, has nothing to find.
func (cfg *Config) review(m Member) ([]chrystoki.Finding, error) {
	if m.Driver != lunaDriver {
		return nil, nil
	}
	path := m.Settings["chrystoki_conf"]
	if path == "" {
		path = cfg.clientConf
	}
	f, err := chrystoki.Load(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && m.Settings["chrystoki_conf"] == "":
		return nil, nil
	case err != nil:
		return nil, err
	}
	return f.Review(chrystoki.Choice{Label: m.Settings["token_label"], Serial: m.Settings["token_serial"]}), nil
}

func (cfg *Config) warn(c *collector, path string, m Member, text string) {
	cfg.Warnings = append(cfg.Warnings, c.fault(path, "member %s: %s", m.Name, text).String())
}
