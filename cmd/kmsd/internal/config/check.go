package config

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
)

const (
	maxMembers = 32 // of a group
	minDomain  = 32 // bytes of a domain secret

	// A Unix socket's name has to fit into sun_path, with its end mark. unix(7).
	maxSocketPath = 107
)

// namePattern is what groups, members and drivers may be called: names end up in
// paths, URLs and tables.
var namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// check looks at everything that can be told without starting a driver.
func (cfg *Config) check(c *collector, opts Options) {
	cfg.checkListen(c)
	cfg.checkVault(c)
	cfg.checkFiles(c)
	if len(cfg.Groups) == 0 {
		c.check("groups", "missing; kmsd needs at least one group of HSMs")
	}
	names := map[string]string{}
	sums := map[string]string{} // :: driver program → its SHA-256, "" when it cannot be run
	for i, g := range cfg.Groups {
		at := fmt.Sprintf("groups[%d]", i)
		checkName(c, at+".name", g.Name, names)
		cfg.checkGroup(c, at, g)
		cfg.checkMembers(c, at, g, opts, sums)
	}
	if cfg.Log.Level != "" && hclog.LevelFromString(cfg.Log.Level) == hclog.NoLevel {
		c.check("log.level", "%q is none of trace, debug, info, warn, error", cfg.Log.Level)
	}
}

func (cfg *Config) checkListen(c *collector) {
	if len(cfg.Listen) == 0 {
		c.check("listen", `missing; name at least one address, as in ["https://127.0.0.1:8420"]`)
	}
	https := false
	for i, addr := range cfg.Listen {
		at := fmt.Sprintf("listen[%d]", i)
		switch network, _, err := ParseListen(addr); {
		case err != nil:
			c.check(at, "%v", err)
		case slices.Index(cfg.Listen, addr) < i:
			c.check(at, "%s is given twice", addr)
		default:
			https = https || network == "tcp"
		}
	}
	if https {
		cfg.checkTLS(c)
	}
}

// ParseListen splits an address into what net.Listen wants.
func ParseListen(addr string) (network, address string, err error) {
	u, err := url.Parse(addr)
	switch {
	case err != nil || u.Scheme == "":
		return "", "", fmt.Errorf("%q is not an address; use https://HOST:PORT or unix:///PATH", addr)
	case u.Scheme == "unix":
		if u.Host != "" || !filepath.IsAbs(u.Path) {
			return "", "", fmt.Errorf("%q has no absolute path; use unix:///PATH", addr)
		}
		if len(u.Path) > maxSocketPath {
			return "", "", fmt.Errorf("the path of a Unix socket may have %d bytes, this one has %d", maxSocketPath, len(u.Path))
		}
		return "unix", u.Path, nil
	case u.Scheme == "http":
		return "", "", fmt.Errorf("%q would serve keys without TLS; use https:// or unix://", addr)
	case u.Scheme != "https":
		return "", "", fmt.Errorf("%q: %s is not served; use https:// or unix://", addr, u.Scheme)
	case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.User != nil:
		return "", "", fmt.Errorf("%q has more than a host and a port", addr)
	}
	if _, port, err := net.SplitHostPort(u.Host); err != nil || port == "" {
		return "", "", fmt.Errorf("%q has no port; use https://HOST:PORT", addr)
	}
	return "tcp", u.Host, nil
}

func (cfg *Config) checkTLS(c *collector) {
	ok := true
	if cfg.TLS.Cert == "" {
		c.check("tls.cert", "missing; an https listener needs a certificate")
		ok = false
	}
	if cfg.TLS.Key == "" {
		c.check("tls.key", "missing; an https listener needs the key of its certificate")
		ok = false
	} else if _, err := readKey(cfg.TLS.Key); err != nil {
		c.check("tls.key", "%v", err)
		ok = false
	}
	if ok {
		pair, err := cfg.TLS.pair()
		if err != nil {
			c.check("tls.cert", "%v", err)
		} else if text := Ending(pair.Leaf, time.Now()); text != "" && !slices.Contains(cfg.Warnings, text) {
			cfg.Warnings = append(cfg.Warnings, text)
		}
	}
	if cfg.TLS.ClientCA != "" {
		if _, err := cfg.TLS.clients(); err != nil {
			c.check("tls.client_ca", "%v", err)
		}
	}
}

// checkFiles looks at the files of the daemon itself.
func (cfg *Config) checkFiles(c *collector) {
	for _, f := range []struct{ path, file, why string }{
		{"catalog.bolt.path", cfg.Catalog.Bolt.Path, "kmsd remembers its keys there"},
		{"audit.file", cfg.Audit.File, "kmsd writes down there who did what"},
	} {
		if f.file == "" {
			c.check(f.path, "missing; %s", f.why)
		} else if info, err := os.Stat(filepath.Dir(f.file)); err != nil {
			c.check(f.path, "%v; make that directory, for the user of kmsd only", plain(err))
		} else if !info.IsDir() {
			c.check(f.path, "%s is not a directory", filepath.Dir(f.file))
		}
	}
	for _, f := range []struct{ path, file, why string }{
		{"auth.tokens", cfg.Auth.Tokens, "it says who may come in"},
		{"auth.policies", cfg.Auth.Policies, "it says who may do what"},
	} {
		if f.file == "" {
			c.check(f.path, "missing; %s", f.why)
		} else if _, err := os.Stat(f.file); err != nil {
			c.check(f.path, "%v", plain(err))
		}
	}
	if cfg.DriverDir == "" {
		c.check("driver_dir", "missing; it is the directory of the kmsd-driver-* programs")
	} else if info, err := os.Stat(cfg.DriverDir); err != nil {
		c.check("driver_dir", "%v", plain(err))
	} else if !info.IsDir() {
		c.check("driver_dir", "%s is not a directory", cfg.DriverDir)
	}
}

func (cfg *Config) checkGroup(c *collector, at string, g Group) {
	if n := cfg.checkSecret(c, at+".domain", g.Domain, "the domain secret of the group"); n > 0 && n < minDomain {
		c.check(at+".domain", "the secret has %d bytes and needs at least %d; make one with: openssl rand -base64 32", n, minDomain)
	}
	if g.MinCopies < 0 || len(g.Members) > 0 && g.MinCopies > len(g.Members) {
		c.check(at+".min_copies", "%d copies cannot be kept on %d members", g.MinCopies, len(g.Members))
	}
	for _, d := range []struct {
		path string
		v    time.Duration
	}{
		{".command_timeout", g.CommandTimeout},
		{".probe_interval", g.ProbeInterval},
		{".recovery.interval", g.Recovery.Interval},
	} {
		if d.v < 0 {
			c.check(at+d.path, "%v is negative", d.v)
		} else if d.v > 0 && d.v < 10*time.Millisecond {
			c.check(at+d.path, "%v is too short; at least 10ms", d.v)
		}
	}
	if m := g.Recovery.Mode; m != "" && m != "auto" && m != "manual" {
		c.check(at+".recovery.mode", "%q is neither auto nor manual", m)
	}
	if r := g.Recovery.Retries; r != nil && *r < -1 {
		c.check(at+".recovery.retries", "%d attempts; use -1 for no end, 0 for none", *r)
	}
	if b := g.Balance; b != "" && b != "cost" && b != "count" {
		c.check(at+".balance", "%q is neither cost nor count", b)
	}
}

func (cfg *Config) checkMembers(c *collector, at string, g Group, opts Options, sums map[string]string) {
	switch n := len(g.Members); {
	case n == 0:
		c.check(at+".members", "missing; a group needs at least one HSM")
	case n > maxMembers:
		c.check(at+".members", "%d members; at most %d", n, maxMembers)
	}
	names := map[string]string{}
	tokens := map[string]string{} // :: what names a token → the member that has it
	for i, m := range g.Members {
		at := fmt.Sprintf("%s.members[%d]", at, i)
		checkName(c, at+".name", m.Name, names)
		cfg.checkSecret(c, at+".pin", m.PIN, "the PIN of "+m.Name)
		cfg.checkDriver(c, at, m, opts.Dev, sums)
		if module := m.Settings["module"]; opts.Modules && filepath.IsAbs(module) {
			if _, err := os.Stat(module); err != nil {
				c.check(at+".settings.module", "%v", plain(err))
			}
		}
		cfg.checkChrystoki(c, at, m, opts)
		cfg.warnOfExposed(c, at, m)
		key := token(m)
		if other, taken := tokens[key]; taken && len(m.Settings) > 0 {
			c.check(at+".settings", "the same token as member %s; every member needs its own", other)
		}
		tokens[key] = m.Name
	}
}

// token returns what tells a member's token from others.
func token(m Member) string {
	return strings.Join([]string{m.Driver, m.Settings["module"], m.Settings["softhsm_conf"], m.Settings["chrystoki_conf"], m.Settings["token_label"], m.Settings["token_serial"]}, "\x00")
}

func (cfg *Config) checkDriver(c *collector, at string, m Member, dev bool, sums map[string]string) {
	if m.Driver == "" {
		c.check(at+".driver", "missing; softhsm, for example")
		return
	}
	if !namePattern.MatchString(m.Driver) {
		c.check(at+".driver", "%q is not a name; use a-z 0-9 . _ -", m.Driver)
		return
	}
	path := cfg.DriverPath(m.Driver)
	sum, known := sums[path]
	if !known {
		var err error
		if sum, err = Sum(path); err != nil && cfg.DriverDir != "" {
			c.check(at+".driver", "%v", err)
		}
		sums[path] = sum
	}
	want, err := hex.DecodeString(m.SHA256)
	have, _ := hex.DecodeString(sum) // Sum made it
	switch {
	case m.SHA256 == "" && dev:
	case m.SHA256 == "" && sum == "":
		c.check(at+".sha256", "missing; kmsd runs no driver that it does not know")
	case m.SHA256 == "":
		c.check(at+".sha256", "missing; if you trust %s as it is now: sha256: %s", path, sum)
	case err != nil || len(want) != 32:
		c.check(at+".sha256", "not a SHA-256; want 64 hexadecimal digits")
	case sum != "" && !bytes.Equal(want, have):
		c.check(at+".sha256", "%s is another program: its SHA-256 is %s", path, sum)
	}
}

func checkName(c *collector, path, name string, taken map[string]string) {
	switch other, dup := taken[name]; {
	case name == "":
		c.check(path, "missing")
	case !namePattern.MatchString(name):
		c.check(path, "%q is not a name; use a-z 0-9 . _ -, at most 63, beginning with a letter or digit", name)
	case dup:
		c.check(path, "%q is the name of %s too", name, strings.TrimSuffix(other, ".name"))
	default:
		taken[name] = path
	}
}

// checkSecret returns the length of a secret, 0 when it cannot be told. A program
// is not run for that: it may ask somebody, or count.
func (cfg *Config) checkSecret(c *collector, path string, s Secret, what string) int {
	given := 0
	for _, is := range []bool{s.File != "", s.Env != "", len(s.Exec) > 0} {
		if is {
			given++
		}
	}
	switch {
	case given == 0:
		c.check(path, "missing; %s, as {file: …}, {env: …} or {exec: […]}", what)
		return 0
	case given > 1:
		c.check(path, "file, env and exec exclude each other")
		return 0
	case len(s.Exec) > 0:
		if err := checkProgram(s.Exec[0]); err != nil {
			c.check(path+".exec", "%v", err)
		}
		return 0
	}
	at := path + ".file"
	if s.Env != "" {
		at = path + ".env"
	}
	b, err := s.read(context.Background(), cfg.environ)
	defer clear(b)
	if err != nil {
		c.check(at, "%v", err)
	}
	return len(b)
}
