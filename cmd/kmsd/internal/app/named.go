package app

import (
	"context"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

func newNamed(s *session) *cobra.Command {
	return family("key", "Make, list, read and rotate the data keys of a database",
		newNamedCreate(s), newNamedPut(s), newNamedGet(s), newNamedList(s), newNamedRotate(s))
}

// onNamed is a command on one data key.
func (s *session) onNamed(cmd *cobra.Command, run func(ctx context.Context, svc service, database, id string) error) *cobra.Command {
	cmd.Use += " NAME KEY"
	cmd.ValidArgsFunction = s.completeDatabases
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) != 2 {
			return &usageError{msg: cmd.CommandPath() + " wants the NAME of a database and the KEY of a data key"}
		}
		return nil
	}
	return s.connected(cmd, func(cmd *cobra.Command, svc service, args []string) error {
		return run(cmd.Context(), svc, args[0], args[1])
	})
}

func newNamedCreate(s *session) *cobra.Command {
	var n int
	none := 0
	cmd := &cobra.Command{
		Use:     "create",
		Short:   "Make a data key, that is its version 1, in the random source of an HSM",
		Example: "  kmsd database key create shop 1",
	}
	cmd.Flags().IntVar(&n, "bytes", 32, "length, 1 to 1024")
	return s.onNamed(cmd, func(ctx context.Context, svc service, database, id string) error {
		if n < 1 || n > api.MaxDataKey { // zero would mean the default on the wire
			return &usageError{msg: fmt.Sprintf("--bytes %d: a data key has 1 to %d bytes", n, api.MaxDataKey)}
		}
		return s.printMade(svc.PutNamedKey(ctx, database, id, api.NamedKeyPut{Bytes: n, CAS: &none}))
	})
}

func newNamedPut(s *session) *cobra.Command {
	var raw bool
	cmd := &cobra.Command{
		Use:     "put",
		Short:   "Make what is on stdin, 1 byte to 64 KiB, the first or the next version of a data key",
		Long:    "Make what is on stdin, 1 byte to 64 KiB, the first or the next version of a data key.\nInput is base64; --raw takes bytes as they are.",
		Example: "  openssl rand -base64 32 | kmsd database key put shop 1",
	}
	cmd.Flags().BoolVar(&raw, "raw", false, "bytes as they are on stdin, in place of base64")
	return s.onNamed(cmd, func(ctx context.Context, svc service, database, id string) error {
		in, err := s.readInput(raw)
		if err != nil {
			return err
		}
		defer clear(in)
		return s.printMade(svc.PutNamedKey(ctx, database, id, api.NamedKeyPut{Plaintext: in}))
	})
}

func newNamedRotate(s *session) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Make the next version of a data key in the random source of an HSM, as long as the newest is",
	}
	return s.onNamed(cmd, func(ctx context.Context, svc service, database, id string) error {
		return s.printMade(svc.RotateNamedKey(ctx, database, id))
	})
}

// printMade says which version has been made.
func (s *session) printMade(k api.NamedKey, err error) error {
	if err != nil {
		return err
	}
	return s.print(k, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s: version %d of data key %s, under version %d of its master key\n", k.Database, k.Version, clean(idText(k.ID, k.Raw)), k.Master)
		return err
	})
}

func newNamedGet(s *session) *cobra.Command {
	var raw bool
	var version int
	cmd := &cobra.Command{
		Use:   "get",
		Short: "Print a data key in the clear",
		Long: "Print a data key in the clear, as base64; --raw gives bytes as they are. -o json tells its version too.\n" +
			"This is audited.",
	}
	cmd.Flags().BoolVar(&raw, "raw", false, "bytes as they are on stdout, in place of base64")
	cmd.Flags().IntVar(&version, "version", 0, "which version (default: the newest)")
	return s.onNamed(cmd, func(ctx context.Context, svc service, database, id string) error {
		switch {
		case raw && s.output == "json":
			return &usageError{msg: "--raw and -o json exclude each other"}
		case version < 0:
			return &usageError{msg: "--version is negative"}
		}
		k, err := svc.NamedKey(ctx, database, id, version)
		if err != nil {
			return err
		}
		defer clear(k.Plaintext)
		if s.output == "json" {
			return s.printJSON(k)
		}
		return s.writeBytes(k.Plaintext, raw)
	})
}

func newNamedList(s *session) *cobra.Command {
	var prefix string
	cmd := &cobra.Command{Use: "list NAME", Short: "List the data keys of a database by their ID, without plaintext"}
	cmd.Flags().StringVar(&prefix, "prefix", "", "only IDs that begin with this")
	return s.onDatabase(cmd, func(ctx context.Context, svc service, name string) error {
		all := api.NamedKeyPage{Keys: []api.NamedKey{}}
		opts := api.ListOptions{Prefix: prefix, Limit: api.MaxPage}
		for more := true; more; more = opts.After != "" {
			page, err := svc.NamedKeys(ctx, name, opts)
			if err != nil {
				return err
			}
			all.Keys = append(all.Keys, page.Keys...)
			opts.After = page.Next
		}
		return s.print(all, func(w io.Writer) error {
			t := newTable(w, "key", "version", "form", "under", "created", "deleted")
			for _, k := range all.Keys {
				form := "bytes"
				if k.Object {
					form = "object"
				}
				t.row(idText(k.ID, k.Raw), k.Version, form, k.Master, when(k.Created), whenPtr(k.Deleted))
			}
			return t.writeTo(w)
		})
	})
}

// idText is the ID of a data key for a person; one that is no text is quoted as Go does
// it.
func idText(id string, raw []byte) string {
	if raw != nil {
		return strconv.Quote(string(raw))
	}
	return id
}
