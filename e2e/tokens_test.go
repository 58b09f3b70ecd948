package e2e_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"go.yaml.in/yaml/v3"

	"kmsd/internal/devserver"
	"kmsd/pluginproto"
)

// devConfig is what the tests read from the kmsd.yaml that "kmsd dev" writes.
type devConfig struct {
	Catalog struct {
		Bolt struct {
			Path string `yaml:"path"`
		} `yaml:"bolt"`
	} `yaml:"catalog"`
	Groups []struct {
		Domain struct {
			File string `yaml:"file"`
		} `yaml:"domain"`
		Members []memberConfig `yaml:"members"`
	} `yaml:"groups"`
	Audit struct {
		File string `yaml:"file"`
	} `yaml:"audit"`
}

type memberConfig struct {
	Name string `yaml:"name"`
	PIN  struct {
		File string `yaml:"file"`
	} `yaml:"pin"`
	Settings map[string]string `yaml:"settings"`
}

func configOf(t *testing.T, s *devserver.Server) devConfig {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(s.Dir, "kmsd.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var cfg devConfig
	if err := yaml.Unmarshal(b, &cfg); err != nil {
		t.Fatal(err)
	}
	absolute := func(p *string) {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(s.Dir, *p)
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
	return cfg
}

// member returns the configuration of one member.
func (c devConfig) member(t *testing.T, name string) memberConfig {
	t.Helper()
	for _, m := range c.Groups[0].Members {
		if m.Name == name {
			return m
		}
	}
	t.Fatalf("kmsd.yaml has no member %s", name)
	return memberConfig{}
}

// readSecret reads a secret as kmsd does.
func readSecret(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.TrimRight(b, "\r\n")
}

// openToken runs a driver of the test's own on a member's token, past kmsd.
func openToken(t *testing.T, cfg devConfig, name string) pluginproto.Driver {
	t.Helper()
	m := cfg.member(t, name)
	p := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  pluginproto.Handshake(),
		Plugins:          plugin.PluginSet{pluginproto.PluginName: pluginproto.NewPlugin(pluginproto.ClientOptions{})},
		Cmd:              exec.Command(filepath.Join(bin, "kmsd-driver-softhsm")),
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		AutoMTLS:         true,
		SkipHostEnv:      true,
		Logger:           hclog.NewNullLogger(),
	})
	t.Cleanup(p.Kill)
	rpc, err := p.Client()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := rpc.Dispense(pluginproto.PluginName)
	if err != nil {
		t.Fatal(err)
	}
	d := raw.(pluginproto.Driver)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err = d.Open(ctx, pluginproto.OpenRequest{
		Settings: m.Settings,
		PIN:      readSecret(t, m.PIN.File),
		Domain:   readSecret(t, cfg.Groups[0].Domain.File),
	})
	if err != nil {
		t.Fatalf("opening the token of %s: %v", name, err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// unwrapOn decrypts an envelope on one token. The layout of envelopes is written
// down here a second time, so that a change of it is noticed.
func unwrapOn(ctx context.Context, d pluginproto.Driver, envelope, aad []byte) ([]byte, error) {
	const (
		identity = 4 + 1 + 1     // after "KMSD", the format version and the algorithm
		iv       = identity + 16 // bytes of a pluginproto.KeyID
		header   = iv + 12
	)
	if len(envelope) < header+16 || string(envelope[:4]) != "KMSD" || envelope[4] != 1 {
		return nil, fmt.Errorf("an envelope of %d bytes that begins with %x", len(envelope), envelope[:min(6, len(envelope))])
	}
	r, err := d.Do(ctx, pluginproto.Command{
		Op:    pluginproto.OpDecrypt,
		Mech:  pluginproto.AESGCM,
		Key:   pluginproto.KeyID(envelope[identity:iv]),
		IV:    envelope[iv:header],
		AAD:   append(bytes.Clone(envelope[:header]), aad...),
		Input: envelope[header:],
	})
	return r.Output, err
}
