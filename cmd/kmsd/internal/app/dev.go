package app

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"kmsd/cmd/kmsd/internal/config"
	"kmsd/cmd/kmsd/internal/daemon"
	"kmsd/cmd/kmsd/internal/dev"
)

func newDev(s *session) *cobra.Command {
	var opts dev.Options
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Make tokens, certificates and a configuration, and run a server on them",
		Long: "Make tokens in SoftHSM, certificates and a configuration, and run a server on them. Started\n" +
			"again on the same directory it goes on with the same tokens and keys. DIR/env.sh is there\nwhile the server answers. For trying out and for tests; for more, see kmsd serve.",
		Args: usageArgs(cobra.NoArgs),
	}
	f := cmd.Flags()
	f.StringVar(&opts.Dir, "dir", ".kmsd", "directory for everything that is made")
	f.IntVar(&opts.Members, "members", 3, "HSMs in the group (default for a directory that has some: those)")
	f.StringVar(&opts.Listen, "listen", "127.0.0.1:8420", "HOST:PORT to serve; port 0 picks a free one")
	f.StringVar(&opts.DriverDir, "driver-dir", "", "directory of kmsd-driver-softhsm (KMSD_DRIVER_DIR; default: beside kmsd)")
	logLevel := f.String("log-level", "info", "trace, debug, info, warn or error")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if !cmd.Flags().Changed("members") {
			opts.Members = 0
		} else if opts.Members < 1 || opts.Members > dev.MaxMembers {
			return &usageError{msg: fmt.Sprintf("--members %d: 1 to %d can be made", opts.Members, dev.MaxMembers)}
		}
		if _, _, err := config.ParseListen("https://" + opts.Listen); err != nil {
			return &usageError{msg: fmt.Sprintf("--listen %q is not HOST:PORT", opts.Listen)}
		}
		if hclog.LevelFromString(*logLevel) == hclog.NoLevel {
			return &usageError{msg: fmt.Sprintf("--log-level %q is none of trace, debug, info, warn, error", *logLevel)}
		}
		if opts.DriverDir == "" {
			opts.DriverDir = defaultDriverDir()
		}
		return s.runDev(cmd.Context(), opts, *logLevel)
	}
	return cmd
}

func (s *session) runDev(ctx context.Context, opts dev.Options, logLevel string) (err error) {
	site, err := dev.Prepare(ctx, opts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, site.Close()) }()
	return daemon.Run(ctx, daemon.Options{
		// The site is complete in itself; variables that lead clients or other servers
		// elsewhere have no say in it.
		Load: func() (*config.Config, error) {
			return config.Load(site.Config, config.Options{Dev: true, Environ: []string{"KMSD_LOG_LEVEL=" + logLevel}})
		},
		Listeners: site.Listeners,
		Databases: site.Databases(),
		Log:       s.Err,
		Ready: func([]string) error {
			if err := site.Announce(); err != nil {
				return fmt.Errorf("writing env.sh: %w", err)
			}
			_, err := fmt.Fprintf(s.Out, devHelp, site.Addr, strings.Join(site.Members, ", "), site.Dir, site.VaultAddr)
			return err
		},
	})
}

const devHelp = `
kmsd serves %s with %s.
In another shell:

  . '%s/env.sh'
  kmsd status
  kmsd key create shop
  echo hello | kmsd wrap shop --raw > hello.wrapped
  kmsd unwrap shop --raw < hello.wrapped

For databases it is a Vault at %s, with the mount mariadb.

Ctrl-C ends it; the same command goes on with the same keys.
`

// defaultDriverDir is KMSD_DRIVER_DIR, or where kmsd itself is, or where packages
// put drivers if there is one.
func defaultDriverDir() string {
	const packaged = "/usr/lib/kmsd/drivers"
	if dir := os.Getenv("KMSD_DRIVER_DIR"); dir != "" {
		return dir
	}
	exe, err := os.Executable()
	if err != nil {
		return packaged
	}
	if real, err := filepath.EvalSymlinks(exe); err == nil {
		exe = real
	}
	beside := filepath.Dir(exe)
	if _, err := os.Stat(filepath.Join(beside, "kmsd-driver-softhsm")); err != nil {
		if _, err := os.Stat(packaged); err == nil {
			return packaged
		}
	}
	return beside
}
