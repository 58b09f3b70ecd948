package app

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"kmsd/cmd/kmsd/internal/config"
	"kmsd/cmd/kmsd/internal/daemon"
)

func newServe(s *session) *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "serve -c FILE",
		Short: "Run a server",
		Long: "Run a server until SIGTERM or SIGINT; requests under way get 10 seconds to end.\n\n" +
			"SIGHUP reads certificates, tokens, policies, members, mounts and the log level anew and reopens the audit log.\n" +
			"Certificates are also read when they change. The log goes to stderr, as JSON unless that is a\nterminal. See kmsd help configuration.",
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if path == "" {
				return errNoConfig()
			}
			return daemon.Run(cmd.Context(), daemon.Options{
				Load: func() (*config.Config, error) { return config.Load(path, config.Options{Flags: cmd.Flags()}) },
				Log:  s.Err,
				Ready: func(addrs []string) error {
					_, err := fmt.Fprintf(s.Out, "kmsd serves %s\n", strings.Join(addrs, " "))
					return err
				},
			})
		},
	}
	addConfigFlag(cmd, &path)
	config.AddFlags(cmd.Flags())
	return cmd
}

func addConfigFlag(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVarP(path, "config", "c", "", "configuration file")
}

func errNoConfig() error {
	return &usageError{msg: "which configuration? -c FILE; see kmsd help configuration, or kmsd dev to try without one"}
}
