package dev

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"fmt"
	"os"
	"slices"

	"go.yaml.in/yaml/v3"

	"kmsd/cmd/kmsd/internal/config"
	"kmsd/kms/api"
)

// clientName is the common name of the client certificate.
const clientName = "kmsd-dev-client"

const policiesYAML = `# What a principal may do. kill -HUP makes kmsd read this anew.
policies:
  admin:
    - actions: ["*"]
      keys: ["*"]
  shop-database:
    - actions: [named-get, named-list, named-put]
      keys: [shop]
`

func (s *Site) tokensYAML() ([]byte, error) {
	admin, err := s.tokenSum("admin.token")
	if err != nil {
		return nil, err
	}
	database, err := s.tokenSum("vault.token")
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, `# Who may come in. kill -HUP makes kmsd read this anew.
tokens:
  - name: admin
    sha256: %s
    policies: [admin]
  - name: shop-database
    sha256: %s
    policies: [shop-database]
certificates:
  - name: dev-client
    common_name: %s
    policies: [admin]
`, admin, database, clientName), nil
}

// tokenSum is what tokens.yaml says of the token in a file.
func (s *Site) tokenSum(name string) (string, error) {
	token, err := os.ReadFile(s.path(name))
	if err != nil {
		return "", err
	}
	defer clear(token)
	sum := sha256.Sum256(bytes.TrimSpace(token))
	return hex.EncodeToString(sum[:]), nil
}

const configHead = `# Written by kmsd dev at every start: changes made here are lost. Copy the file,
# and run kmsd serve -c on the copy, to keep them.
`

// writeConfig writes kmsd.yaml, with the sum of the driver as it is now, so that
// one that was built anew is not refused.
func (s *Site) writeConfig() error {
	sum, err := config.Sum(driver(s.opts.DriverDir))
	if err != nil {
		return err
	}
	type file map[string]string
	type member struct {
		Name     string            `yaml:"name"`
		Driver   string            `yaml:"driver"`
		SHA256   string            `yaml:"sha256"`
		PIN      file              `yaml:"pin"`
		Settings map[string]string `yaml:"settings"`
	}
	type vault struct {
		Listen string          `yaml:"listen"`
		Mounts map[string]file `yaml:"mounts"`
	}
	type group struct {
		Name    string   `yaml:"name"`
		Domain  file     `yaml:"domain"`
		Members []member `yaml:"members"`
	}
	g := group{Name: "default", Domain: file{"file": s.path("domain")}}
	for _, name := range s.Members {
		g.Members = append(g.Members, member{
			Name: name, Driver: "softhsm", SHA256: sum,
			PIN:      file{"file": s.path(name + ".pin")},
			Settings: map[string]string{"token_label": name, "softhsm_conf": s.path(name + ".conf")},
		})
	}
	var listen []string
	for addr := range s.Listeners {
		listen = append(listen, addr)
	}
	if unix := "unix://" + s.path("kmsd.sock"); fitsSocket(unix) {
		listen = append(listen, unix)
	}
	slices.Sort(listen)
	conf := struct {
		Listen    []string        `yaml:"listen,flow"`
		TLS       file            `yaml:"tls"`
		Catalog   map[string]file `yaml:"catalog"`
		DriverDir string          `yaml:"driver_dir"`
		Auth      file            `yaml:"auth"`
		Audit     file            `yaml:"audit"`
		Vault     vault           `yaml:"vault"`
		Groups    []group         `yaml:"groups"`
	}{
		Listen:    listen,
		TLS:       file{"cert": s.path("server.pem"), "key": s.path("server.key"), "client_ca": s.path("ca.pem")},
		Catalog:   map[string]file{"bolt": {"path": s.path("catalog.db")}},
		DriverDir: s.opts.DriverDir,
		Auth:      file{"tokens": s.path("tokens.yaml"), "policies": s.path("policies.yaml")},
		Audit:     file{"file": s.path("audit.jsonl")},
		Vault:     vault{Listen: s.vaultListen, Mounts: map[string]file{vaultMount: {"database": vaultDatabase, "format": api.FormatMariaDB}}},
		Groups:    []group{g},
	}
	text, err := yaml.Marshal(conf)
	if err != nil {
		return fmt.Errorf("writing kmsd.yaml: %w", err)
	}
	return s.write("kmsd.yaml", append([]byte(configHead), text...))
}

// fitsSocket tells whether a socket can have that address: its path is short, and
// nothing in it means something else in a URL.
func fitsSocket(addr string) bool {
	_, path, err := config.ParseListen(addr)
	return err == nil && "unix://"+path == addr
}

// newPIN makes 25 letters and digits: every HSM takes them, and no shell trips.
func newPIN() []byte {
	return append([]byte(base32.StdEncoding.EncodeToString(random(16))[:25]), '\n')
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b) // never fails, see crypto/rand
	return b
}
