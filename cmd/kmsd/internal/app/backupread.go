package app

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"kmsd/cmd/kmsd/internal/config"
	"kmsd/cmd/kmsd/internal/daemon"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/backup"
)

// verified is what a backup has in it, and whether HSMs have looked at its keys.
type verified struct {
	backup.Contents
	Proven bool `json:"proven"`
}

func newBackupVerify(s *session) *cobra.Command {
	cmd := s.reading(&cobra.Command{
		Use:   "verify FILE --identity FILE [-c FILE]",
		Short: "Check a backup to its end, and have HSMs prove its keys",
		Long: "Check a backup to its end: that nothing is missing, altered or in another's place.\n\n" +
			"With -c it connects to the members of a configuration, as kmsd check does, and every key is proved by\n" +
			"an HSM: unwrapped there, compared by its check value, and let go. Nothing is left on a token, and no\n" +
			"catalog is used. A wrong PIN costs one try.",
	}, s.verifyBackup)
	config.AddFlags(cmd.Flags())
	return cmd
}

func (s *session) verifyBackup(ctx context.Context, cmd *cobra.Command, o openable, path string) error {
	out := verified{Proven: path != ""}
	err := s.verifyInto(ctx, cmd, o, path, &out)
	if err != nil {
		return fmt.Errorf("verifying %s: %w", o.path, err)
	}
	return s.print(out, func(w io.Writer) error {
		fmt.Fprintf(w, "created:    %s by kmsd %s\n", when(out.Created), clean(out.Kmsd))
		for _, g := range out.Groups {
			fmt.Fprintf(w, "group:      %s, domain %s\n", clean(g.Name), hex.EncodeToString(g.DomainCheck))
		}
		fmt.Fprintf(w, "keys:       %s, %s\n", counted(out.Keys, "master key"), counted(out.Versions, "living version"))
		fmt.Fprintf(w, "databases:  %s, %s\n", counted(out.Databases, "database"), counted(out.NamedKeys, "data key version"))
		text := "check values were compared in the file, but no HSM has proved its keys (-c FILE)"
		if out.Proven {
			text = "every key was proved by an HSM of its group"
		}
		_, err := fmt.Fprintf(w, "proven:     %s\n", text)
		return err
	})
}

func (s *session) verifyInto(ctx context.Context, cmd *cobra.Command, o openable, path string, out *verified) error {
	if path == "" {
		src, err := o.open()
		if err != nil {
			return err
		}
		defer src.Close()
		out.Contents, err = backup.Verify(src, o.identities...)
		return err
	}
	cfg, err := config.Load(path, config.Options{Flags: cmd.Flags()})
	if err != nil {
		return err
	}
	progress, end := s.counting("proving")
	defer end()
	out.Contents, err = kms.ProveBackup(ctx, cfg.KMS(nil, nil), kms.BackupFile{Open: o.open, Identities: o.identities, Progress: progress})
	return err
}

// restored is what a restore has done, and how the members are after it.
type restored struct {
	kms.RestoreReport
	Catalog string      `json:"catalog"`
	Groups  []api.Group `json:"groups_now"`
}

func newBackupRestore(s *session) *cobra.Command {
	cmd := s.reading(&cobra.Command{
		Use:   "restore FILE --identity FILE -c FILE",
		Short: "Bring a backup to new tokens, and make its catalog",
		Long: "Bring the keys of a backup to every member of a configuration that is there, and make the catalog.\n" +
			"kmsd must not run. The tokens are initialised and of the same domain secret; keys that are on them\n" +
			"already stay. A catalog that is not empty is refused.\n\n" +
			"Before anything is changed the backup is read to its end, and every member proves a key of it.\n" +
			"The catalog is put in its place at the end, in one step: what was cut short is simply run again.",
	}, s.restoreBackup)
	config.AddFlags(cmd.Flags())
	return cmd
}

func (s *session) restoreBackup(ctx context.Context, cmd *cobra.Command, o openable, path string) error {
	if path == "" {
		return errNoConfig()
	}
	cfg, err := config.Load(path, config.Options{Flags: cmd.Flags()})
	if err != nil {
		return err
	}
	progress, end := s.counting("restoring")
	report, groups, err := daemon.Restore(ctx, cfg, kms.BackupFile{Open: o.open, Identities: o.identities, Progress: progress})
	end()
	if err != nil {
		return fmt.Errorf("restoring %s: %w", o.path, err)
	}
	out := restored{RestoreReport: report, Catalog: cfg.Catalog.Bolt.Path, Groups: groups}
	if err := s.print(out, func(w io.Writer) error { return printRestored(w, o.path, out) }); err != nil {
		return err
	}
	return lacking(groups)
}

func printRestored(w io.Writer, path string, out restored) error {
	t := newTable(w, "group", "member", "state", "keys", "missing", "restored", "reason")
	for _, g := range out.Groups {
		for _, m := range g.Members {
			came, reason := 0, m.Reason
			for _, r := range out.Members {
				if r.Group == g.Name && r.Member == m.Name {
					came = r.Keys
					if reason == "" {
						reason = r.Error
					}
				}
			}
			t.row(g.Name, m.Name, memberState(m.State), m.Keys, m.Missing, came, reason)
		}
	}
	if err := t.writeTo(w); err != nil {
		return err
	}
	if err := describeBackup(w, "restored", path, out.BackupReport); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "the catalog is %s; start kmsd when all is as it should be\n", out.Catalog)
	return err
}

// lacking is the error of a restore after which a member that serves lacks keys.
func lacking(groups []api.Group) error {
	for _, g := range groups {
		for _, m := range g.Members {
			if (m.State == api.MemberActive || m.State == api.MemberStandby) && m.Missing > 0 {
				return errors.New("the catalog is restored, but a member lacks keys; kmsd goes on bringing them over")
			}
		}
	}
	return nil
}
