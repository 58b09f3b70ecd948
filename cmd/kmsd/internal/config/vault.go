package config

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"

	"kmsd/kms/api"
)

// Vault is the listener for databases that take their data keys from a Vault. It is one
// of its own: it is closed while no HSM serves.
type Vault struct {
	Listen string           `koanf:"listen"` // https://HOST:PORT; "" means that there is none
	Mounts map[string]Mount `koanf:"mounts"` // :: what clients call a mount, such as "mariadb" or "team/db1" → what is behind it
}

// Mount shows the data keys of a database.
type Mount struct {
	Database string `koanf:"database"`
	Format   string `koanf:"format"` // "" or mariadb, see api.Database
}

const maxMountName = 128 // bytes

// Formats says for databases what their data keys must be. :: database → format
func (v Vault) Formats() map[string]string {
	out := map[string]string{}
	for _, m := range v.Mounts {
		if m.Format != "" {
			out[m.Database] = m.Format
		}
	}
	return out
}

func (cfg *Config) checkVault(c *collector) {
	v := cfg.Vault
	switch {
	case v.Listen == "" && len(v.Mounts) > 0:
		c.check("vault.listen", `missing; the mounts are served there, as in "https://127.0.0.1:8421"`)
	case v.Listen != "" && len(v.Mounts) == 0:
		c.check("vault.mounts", "missing; name at least one, as in {mariadb: {database: shop, format: mariadb}}")
	}
	if v.Listen != "" {
		cfg.checkVaultListen(c)
	}
	names := slices.Sorted(maps.Keys(v.Mounts))
	formats := map[string]string{} // :: database → the first mount that shows it
	for i, name := range names {
		at := "vault.mounts." + name
		if err := checkMountName(name); err != nil {
			c.check(at, "%v", err)
		}
		for _, other := range names[:i] {
			if strings.HasPrefix(name, other+"/") {
				c.check(at, "lies within the mount %s: nobody could tell which of them a path means", other)
			}
		}
		cfg.checkMount(c, at, v.Mounts[name])
		first, seen := formats[v.Mounts[name].Database]
		if !seen {
			formats[v.Mounts[name].Database] = name
		} else if v.Mounts[first].Format != v.Mounts[name].Format {
			c.check(at+".format", "database %s has another format in mount %s; a database has one", v.Mounts[name].Database, first)
		}
	}
}

func (cfg *Config) checkVaultListen(c *collector) {
	network, address, err := ParseListen(cfg.Vault.Listen)
	switch {
	case err != nil:
		c.check("vault.listen", "%v", err)
		return
	case network != "tcp":
		c.check("vault.listen", "databases come over TLS; use https://HOST:PORT")
		return
	}
	for _, addr := range cfg.Listen {
		if _, other, err := ParseListen(addr); err == nil && collide(address, other) {
			c.check("vault.listen", "%s is served by listen too; this listener needs a port of its own, because it is closed while no HSM serves", addr)
		}
	}
	cfg.checkTLS(c)
}

// collide says whether two addresses cannot both be served, as far as their text tells.
func collide(a, b string) bool {
	hostA, portA, errA := net.SplitHostPort(a)
	hostB, portB, errB := net.SplitHostPort(b)
	if errA != nil || errB != nil || portA != portB || portA == "0" {
		return false
	}
	return hostA == hostB || everywhere(hostA) || everywhere(hostB)
}

func everywhere(host string) bool {
	ip := net.ParseIP(host)
	return host == "" || ip != nil && ip.IsUnspecified()
}

// checkMountName takes names whose every step could be the name of a key, so that a path
// says only in one way which mount it means.
func checkMountName(name string) error {
	const how = "; a mount has 1 to 128 letters, digits, . _ - and slashes between them, and no step begins with . or -"
	if len(name) > maxMountName {
		return fmt.Errorf("the name has %d bytes%s", len(name), how)
	}
	steps := strings.Split(name, "/")
	for _, step := range steps {
		if api.CheckName(step) != nil {
			return fmt.Errorf("%q is not the name of a mount%s", name, how)
		}
	}
	switch steps[0] {
	case "sys", "auth", "cubbyhole", "identity", "audit":
		return fmt.Errorf("%s/ is Vault's own; choose another name", steps[0])
	}
	return nil
}

func (cfg *Config) checkMount(c *collector, at string, m Mount) {
	if m.Database == "" {
		c.check(at+".database", "missing; it is the database whose data keys the mount shows")
	} else if err := api.CheckName(m.Database); err != nil {
		c.check(at+".database", "%q is not the name of a database; use a-z A-Z 0-9 . _ -, at most %d, beginning with none of . -", m.Database, api.MaxNameLen)
	}
	if m.Format != "" && m.Format != api.FormatMariaDB {
		c.check(at+".format", "%q is not a format; %s, or leave it out for any value", m.Format, api.FormatMariaDB)
	}
}
