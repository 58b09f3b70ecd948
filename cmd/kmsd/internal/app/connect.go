package app

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kmsd/kms/api"
	"kmsd/kms/client"
)

// service is what the commands ask of a server. *client.Client is one.
type service interface {
	api.Service
	api.Admin
	api.Backups
	api.Databases
	Groups(ctx context.Context) (api.Status, error)
	Group(ctx context.Context, group string) (api.Group, error)
	EventsAfter(ctx context.Context, last int) iter.Seq[api.Event]
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

// complete offers names to the shell, for the one argument of a command. A server
// that does not answer offers nothing.
func (s *session) complete(cmd *cobra.Command, args []string, names func(ctx context.Context, svc service) ([]string, error)) ([]string, cobra.ShellCompDirective) {
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
	found, err := names(ctx, svc)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return found, cobra.ShellCompDirectiveNoFileComp
}

func (s *session) completeKeys(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	return s.complete(cmd, args, func(ctx context.Context, svc service) (names []string, err error) {
		page, err := svc.Keys(ctx, api.ListOptions{Prefix: prefix})
		for _, k := range page.Keys {
			names = append(names, k.Name)
		}
		return names, err
	})
}

func (s *session) completeGroups(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return s.complete(cmd, args, func(ctx context.Context, svc service) (names []string, err error) {
		st, err := svc.Groups(ctx)
		for _, g := range st.Groups {
			names = append(names, g.Name)
		}
		return names, err
	})
}

// completeGroupFlag is completeGroups for the value of a flag.
func (s *session) completeGroupFlag(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	return s.completeGroups(cmd, nil, prefix)
}

// completeFlag has the values of a flag completed. The command must have the flag.
func completeFlag(cmd *cobra.Command, flag string, f cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(fmt.Sprintf("completing a flag of %s: %v", cmd.Name(), err))
	}
}

// completeMembers offers those of every group, or of the one that --group names.
func (s *session) completeMembers(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	group, err := cmd.Flags().GetString("group")
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return s.complete(cmd, args, func(ctx context.Context, svc service) (names []string, err error) {
		st, err := svc.Groups(ctx)
		for _, g := range st.Groups {
			for _, m := range g.Members {
				if group == "" || group == g.Name {
					names = append(names, m.Name)
				}
			}
		}
		return names, err
	})
}
