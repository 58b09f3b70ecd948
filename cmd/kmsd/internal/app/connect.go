package app

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kmsd/kms/api"
	"kmsd/kms/client"
)

// service is what the commands ask of a server. *client.Client is one.
type service interface {
	api.Service
	Groups(ctx context.Context) (api.Status, error)
	Group(ctx context.Context, group string) (api.Group, error)
	Recover(ctx context.Context, group, member string) error
}

var _ service = (*client.Client)(nil)

const (
	defaultAddr       = "https://127.0.0.1:8420"
	completionTimeout = 2 * time.Second // a shell waits that long for names
)

// addFlags defines the flags that lead to a server. They belong to the root, so that
// they may stand before the command too.
func (s *session) addFlags(f *pflag.FlagSet) {
	f.StringVar(&s.conn.Addr, "addr", "", "server: https://HOST:PORT or unix:///PATH (KMSD_ADDR; default "+defaultAddr+")")
	f.StringVar(&s.conn.CACert, "cacert", "", "PEM file of the CA that signed the server's certificate (KMSD_CACERT)")
	f.StringVar(&s.conn.Cert, "cert", "", "PEM file of a client certificate (KMSD_CERT)")
	f.StringVar(&s.conn.Key, "key", "", "PEM file of its key (KMSD_KEY)")
	f.StringVar(&s.conn.Token, "token", "", "token; better KMSD_TOKEN, which no process list shows")
}

// connected makes a command call run with a client.
func (s *session) connected(cmd *cobra.Command, run func(cmd *cobra.Command, svc service, args []string) error) *cobra.Command {
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		svc, err := s.open()
		if err != nil {
			return err
		}
		return errors.Join(run(cmd, svc, args), svc.Close())
	}
	return cmd
}

// open makes a client. It does not talk to the server yet.
func (s *session) open() (service, error) {
	conn, env := s.conn, client.FromEnv()
	conn.Addr = cmp.Or(conn.Addr, env.Addr, defaultAddr)
	conn.CACert = cmp.Or(conn.CACert, env.CACert)
	conn.Cert = cmp.Or(conn.Cert, env.Cert)
	conn.Key = cmp.Or(conn.Key, env.Key)
	conn.Token = cmp.Or(conn.Token, env.Token)
	if (conn.Cert == "") != (conn.Key == "") {
		return nil, &usageError{msg: "a client certificate needs both --cert and --key (or KMSD_CERT and KMSD_KEY)"}
	}
	svc, err := conn.New()
	if err != nil {
		return nil, &usageError{msg: err.Error()}
	}
	return svc, nil
}

// completeKeys offers the names of keys to the shell. A server that does not
// answer offers nothing.
func (s *session) completeKeys(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	svc, err := s.open()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	defer svc.Close()
	page, err := svc.Keys(ctx, api.ListOptions{Prefix: prefix})
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, k := range page.Keys {
		names = append(names, k.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
