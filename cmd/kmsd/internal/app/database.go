package app

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

func newDatabase(s *session) *cobra.Command {
	return family("database", "Keep the data keys of databases that ask for them by name",
		newDatabaseCreate(s), newDatabaseList(s), newDatabaseShow(s), newDatabaseRekey(s), newNamed(s))
}

// onDatabase is a command on one database that is there.
func (s *session) onDatabase(cmd *cobra.Command, run func(ctx context.Context, svc service, name string) error) *cobra.Command {
	cmd.Args, cmd.ValidArgsFunction = oneArg("database NAME"), s.completeDatabases
	return s.connected(cmd, func(cmd *cobra.Command, svc service, args []string) error {
		return run(cmd.Context(), svc, args[0])
	})
}

func (s *session) completeDatabases(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	return s.complete(cmd, args, func(ctx context.Context, svc service) (names []string, err error) {
		page, err := svc.Databases(ctx, api.ListOptions{Prefix: prefix})
		for _, db := range page.Databases {
			names = append(names, db.Name)
		}
		return names, err
	})
}

func newDatabaseCreate(s *session) *cobra.Command {
	var opts api.DatabaseOptions
	var period time.Duration
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a database and, when there is none yet, its master key",
		Long: "Make a database and, when there is none yet, its master key, which has the name of the database\n" +
			"unless --master-key says another one. The other flags are for a key that is made.",
		Example: "  kmsd database create shop\n  kmsd database key create shop 1",
		Args:    oneArg("database NAME"),
	}
	f := cmd.Flags()
	f.StringVar(&opts.Key, "master-key", "", "name of the master key (default: NAME)")
	keyFlags(f, &opts.KeyOptions, &period, "aes-256 (default) or aes-128")
	return s.connected(cmd, func(cmd *cobra.Command, svc service, args []string) error {
		opts.RotationPeriod = api.Duration(period)
		db, err := svc.CreateDatabase(cmd.Context(), args[0], opts)
		if err != nil {
			return err
		}
		return s.printDatabase(db, nil)
	})
}

func newDatabaseList(s *session) *cobra.Command {
	var prefix string
	cmd := &cobra.Command{Use: "list", Short: "List databases by name", Args: usageArgs(cobra.NoArgs)}
	cmd.Flags().StringVar(&prefix, "prefix", "", "only names that begin with this")
	return s.connected(cmd, func(cmd *cobra.Command, svc service, _ []string) error {
		all := api.DatabasePage{Databases: []api.Database{}}
		opts := api.ListOptions{Prefix: prefix, Limit: api.MaxPage}
		for more := true; more; more = opts.After != "" {
			page, err := svc.Databases(cmd.Context(), opts)
			if err != nil {
				return err
			}
			all.Databases = append(all.Databases, page.Databases...)
			opts.After = page.Next
		}
		return s.print(all, func(w io.Writer) error {
			t := newTable(w, "name", "master key", "version", "group", "format", "created")
			for _, db := range all.Databases {
				t.row(db.Name, db.Key, db.Version, db.Group, db.Format, when(db.Created))
			}
			return t.writeTo(w)
		})
	})
}

func newDatabaseShow(s *session) *cobra.Command {
	cmd := &cobra.Command{Use: "show NAME", Short: "Show a database, and how far its last rekey is"}
	return s.onDatabase(cmd, func(ctx context.Context, svc service, name string) error {
		db, err := svc.Database(ctx, name)
		if err != nil {
			return err
		}
		if db.Job == "" || s.output == "json" {
			return s.printDatabase(db, nil)
		}
		job, err := svc.Job(ctx, db.Job)
		if err != nil {
			return err
		}
		return s.printDatabase(db, &job)
	})
}

func (s *session) printDatabase(db api.Database, job *api.Job) error {
	return s.print(db, func(w io.Writer) error {
		format := ""
		if db.Format != "" {
			format = ", format " + db.Format
		}
		_, err := fmt.Fprintf(w, "%s: master key %s version %d, group %s%s\n%s in %s, made %s\n",
			db.Name, db.Key, db.Version, db.Group, format, counted(db.Keys, "data key"), counted(db.Versions, "version"), when(db.Created))
		if err != nil || job == nil {
			return err
		}
		return writeJob(w, *job)
	})
}
