// Package look answers: what is really on the tokens and in the catalog, whatever kmsd
// says?
//
// Tests open them past kmsd, with a driver process of their own.
package look

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"go.yaml.in/yaml/v3"

	"kmsd/kms/catalog"
	"kmsd/kms/catalog/boltcat"
	"kmsd/pluginproto"
)

// Config is what tests read of a kmsd.yaml. Paths are absolute.
type Config struct {
	Catalog struct {
		Bolt struct {
			Path string `yaml:"path"`
		} `yaml:"bolt"`
	} `yaml:"catalog"`
	Groups []struct {
		Domain struct {
			File string `yaml:"file"`
		} `yaml:"domain"`
		Members []Member `yaml:"members"`
	} `yaml:"groups"`
	Audit struct {
		File string `yaml:"file"`
	} `yaml:"audit"`
}

// Member is the entry of one member.
type Member struct {
	Name   string `yaml:"name"`
	Driver string `yaml:"driver"`
	SHA256 string `yaml:"sha256"`
	PIN    struct {
		File string `yaml:"file"`
	} `yaml:"pin"`
	Settings map[string]string `yaml:"settings"`
}

// ReadConfig reads a kmsd.yaml.
func ReadConfig(path string) (Config, error) {
	var cfg Config
	b, err := os.ReadFile(path)
	if err != nil {
		return cfg, err
	}
	if err := yaml.Unmarshal(b, &cfg); err != nil {
		return cfg, fmt.Errorf("reading %s: %w", path, err)
	}
	absolute := func(p *string) {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(path), *p)
		}
	}
	absolute(&cfg.Catalog.Bolt.Path)
	absolute(&cfg.Audit.File)
	for i := range cfg.Groups {
		absolute(&cfg.Groups[i].Domain.File)
		for j := range cfg.Groups[i].Members {
			m := &cfg.Groups[i].Members[j]
			absolute(&m.PIN.File)
			if conf, ok := m.Settings["softhsm_conf"]; ok {
				absolute(&conf)
				m.Settings["softhsm_conf"] = conf
			}
		}
	}
	return cfg, nil
}

// Member returns the entry of a member of the first group.
func (c Config) Member(name string) (Member, error) {
	for _, m := range c.Groups[0].Members {
		if m.Name == name {
			return m, nil
		}
	}
	return Member{}, fmt.Errorf("kmsd.yaml has no member %s", name)
}

// Secret reads a secret as kmsd does.
func Secret(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	return bytes.TrimRight(b, "\r\n"), err
}

// openTimeout is for a driver to open a token, on a machine that is busy with others.
const openTimeout = 2 * time.Minute

// OpenToken runs a member's driver once more, on the token of that member of the first
// group; bin is the folder of drivers. close ends it.
func OpenToken(ctx context.Context, bin string, cfg Config, member string) (_ pluginproto.Driver, close func(), err error) {
	m, err := cfg.Member(member)
	if err != nil {
		return nil, nil, err
	}
	p := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  pluginproto.Handshake(),
		Plugins:          plugin.PluginSet{pluginproto.PluginName: pluginproto.NewPlugin(pluginproto.ClientOptions{})},
		Cmd:              exec.Command(filepath.Join(bin, "kmsd-driver-"+m.Driver)),
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		AutoMTLS:         true,
		SkipHostEnv:      true,
		Logger:           hclog.NewNullLogger(),
	})
	defer func() {
		if err != nil {
			p.Kill()
			err = fmt.Errorf("opening the token of %s: %w", member, err)
		}
	}()
	rpc, err := p.Client()
	if err != nil {
		return nil, nil, err
	}
	raw, err := rpc.Dispense(pluginproto.PluginName)
	if err != nil {
		return nil, nil, err
	}
	d := raw.(pluginproto.Driver)
	pin, err := Secret(m.PIN.File)
	if err != nil {
		return nil, nil, err
	}
	domain, err := Secret(cfg.Groups[0].Domain.File)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	if _, err = d.Open(ctx, pluginproto.OpenRequest{Settings: m.Settings, PIN: pin, Domain: domain}); err != nil {
		return nil, nil, err
	}
	return d, func() { d.Close(); p.Kill() }, nil
}

// Unwrap decrypts an envelope on one token. The layouts of envelopes are written down
// here a second time, so that a change of them is noticed.
func Unwrap(ctx context.Context, d pluginproto.Driver, envelope, aad []byte) ([]byte, error) {
	const (
		identity = 4 + 1 + 1     // after "KMSD", the format version and the algorithm
		behind   = identity + 16 // bytes of a pluginproto.KeyID
	)
	if len(envelope) <= behind || string(envelope[:4]) != "KMSD" {
		return nil, fmt.Errorf("an envelope of %d bytes that begins with %x", len(envelope), envelope[:min(6, len(envelope))])
	}
	header, iv := behind+12, behind // of format version 1, which authenticates its IV of 12 bytes
	end := header
	if envelope[4] != 1 {
		header, iv = behind, behind+1 // the IV's length
		end = iv + int(envelope[behind])
	}
	if envelope[4] > 2 || len(envelope) < end+16 {
		return nil, fmt.Errorf("an envelope of %d bytes that begins with %x", len(envelope), envelope[:behind+1])
	}
	r, err := d.Do(ctx, pluginproto.Command{
		Op:    pluginproto.OpDecrypt,
		Mech:  pluginproto.AESGCM,
		Key:   pluginproto.KeyID(envelope[identity:behind]),
		IV:    envelope[iv:end],
		AAD:   append(bytes.Clone(envelope[:header]), aad...),
		Input: envelope[end:],
	})
	return r.Output, err
}

// Catalog is what a catalog says of keys.
type Catalog struct {
	Living map[string]string // identity of a version that is not destroyed → its check value
	Gone   map[string]bool   // identities with a tombstone
	Open   []string          // operations, destructions and jobs that are not finished
	// DataKeys are all versions of all named data keys, in no meaningful order.
	DataKeys []catalog.OldVersion
}

// ReadCatalog reads the file of a catalog that nobody uses.
func ReadCatalog(ctx context.Context, path string) (_ Catalog, err error) {
	store, err := boltcat.Open(path)
	if err != nil {
		return Catalog{}, err
	}
	defer func() {
		if closeErr := store.Close(); err == nil {
			err = closeErr
		}
	}()
	cat := catalog.New(store)
	c := Catalog{Living: map[string]string{}, Gone: map[string]bool{}}
	for k, err := range cat.Keys(ctx, "", "", 0) {
		if err != nil {
			return c, err
		}
		for _, v := range k.Versions {
			if v.State != catalog.Destroyed {
				c.Living[v.Identity] = hex.EncodeToString(v.CheckValue)
			}
		}
	}
	for tomb, err := range cat.Tombstones(ctx) {
		if err != nil {
			return c, err
		}
		c.Gone[tomb.Identity] = true
		if len(tomb.Pending) > 0 {
			c.Open = append(c.Open, fmt.Sprintf("%s is still to be destroyed on %v", tomb.Identity, tomb.Pending))
		}
	}
	for in, err := range cat.Intents(ctx) {
		if err != nil {
			return c, err
		}
		c.Open = append(c.Open, fmt.Sprintf("an operation is still open: %+v", in))
	}
	for job, err := range cat.Jobs(ctx) {
		if err != nil {
			return c, err
		}
		if job.State == catalog.JobRunning {
			c.Open = append(c.Open, fmt.Sprintf("job %s of database %s is still running: %s", job.ID, job.Database, job.Reason))
		}
	}
	for db, err := range cat.Databases(ctx, "", "", 0) {
		if err != nil {
			return c, err
		}
		if err := c.readDataKeys(ctx, cat, db.Name); err != nil {
			return c, err
		}
	}
	return c, nil
}

func (c *Catalog) readDataKeys(ctx context.Context, cat *catalog.Catalog, database string) error {
	for dk, err := range cat.DataKeys(ctx, database, "", "", 0) {
		if err != nil {
			return err
		}
		c.DataKeys = append(c.DataKeys, catalog.OldVersion{Database: database, ID: dk.ID, DataVersion: dk.DataVersion})
	}
	for old, err := range cat.OldVersions(ctx, database, catalog.OldVersion{}, 0) {
		if err != nil {
			return err
		}
		c.DataKeys = append(c.DataKeys, old)
	}
	return nil
}
