package dev

import (
	"fmt"
	"net"
	"os"
	"strconv"

	"go.yaml.in/yaml/v3"

	"kmsd/cmd/kmsd/internal/config"
)

// What databases find: a mount for MariaDB on a database.
const (
	vaultMount    = "mariadb"
	vaultDatabase = "shop"
	// Another name than the database's: whoever tries kmsd makes a key "shop" of their own.
	vaultKey = "shop-db"
)

// Databases are those that the mounts need. :: name → its master key
func (s *Site) Databases() map[string]string { return map[string]string{vaultDatabase: vaultKey} }

// chooseVaultAddr picks a port for databases on the host that is served: that of the time
// before, or another one when that is taken. The port is free until somebody takes it:
// kmsd listens there only while keys can be used.
func (s *Site) chooseVaultAddr(host string) error {
	port := s.earlierVaultPort()
	l, err := net.Listen("tcp", net.JoinHostPort(host, port))
	if err != nil && port != "0" {
		l, err = net.Listen("tcp", net.JoinHostPort(host, "0"))
	}
	if err != nil {
		return fmt.Errorf("finding a port for databases: %w", err)
	}
	addr := l.Addr().(*net.TCPAddr)
	s.vaultListen = "https://" + addr.String()
	s.VaultAddr = "https://" + net.JoinHostPort(reachable(host, addr.IP), strconv.Itoa(addr.Port))
	return l.Close()
}

// earlierVaultPort reads the port from the configuration of an earlier start; "0" when
// there is none.
func (s *Site) earlierVaultPort() string {
	text, err := os.ReadFile(s.Config)
	if err != nil {
		return "0"
	}
	var earlier struct {
		Vault struct {
			Listen string `yaml:"listen"`
		} `yaml:"vault"`
	}
	if err := yaml.Unmarshal(text, &earlier); err != nil {
		return "0" // it is written anew anyway
	}
	_, address, err := config.ParseListen(earlier.Vault.Listen)
	if err != nil {
		return "0"
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return "0"
	}
	return port
}

// reachable is the host of a listener as a client on this machine writes it.
func reachable(host string, ip net.IP) string {
	if ip.IsUnspecified() || host == "" {
		return "127.0.0.1"
	}
	return host
}
