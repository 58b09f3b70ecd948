package app

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"kmsd/kms/api"
	"kmsd/kms/backup"
)

func newBackup(s *session) *cobra.Command {
	return family("backup", "Make, check and restore backups", newBackupCreate(s), newBackupVerify(s), newBackupRestore(s))
}

// created is what the file of a new backup has in it.
type created struct {
	File string `json:"file"`
	api.BackupReport
}

func newBackupCreate(s *session) *cobra.Command {
	var recipients []string
	var file string
	cmd := &cobra.Command{
		Use:   "create FILE --recipient age1...",
		Short: "Put the keys and the catalog of a running kmsd into a file",
		Long: "Put the keys and the catalog of a running kmsd into a file, encrypted with age to every recipient.\n" +
			"Master keys are in it as their HSMs wrap them under the domain key (a Luna SIM partition: under its\n" +
			"SMK, which is not in it); HSMs that give keys to no file are refused. To restore them takes the\n" +
			"identity of a recipient and the domain secret. age-keygen makes an identity and says its recipient.\n" +
			"An existing file is not overwritten.",
		Args: oneArg("FILE"),
	}
	cmd.Flags().StringArrayVar(&recipients, "recipient", nil, "who can open it: age1...; may be given again")
	cmd.Flags().StringVar(&file, "recipients-file", "", "file with a recipient on each line")
	return s.connected(cmd, func(cmd *cobra.Command, svc service, args []string) error {
		all, err := withFile(recipients, file)
		if err != nil {
			return err
		}
		if _, err := backup.ParseRecipients(all); err != nil {
			return &usageError{msg: err.Error()}
		}
		var report api.BackupReport
		err = writeNew(args[0], func(w io.Writer) (err error) {
			report, err = svc.Backup(cmd.Context(), w, all)
			return err
		})
		if err != nil {
			return err
		}
		return s.print(created{args[0], report}, func(w io.Writer) error {
			return describeBackup(w, "wrote", args[0], report)
		})
	})
}

// withFile adds the recipients of a file, "" for none.
func withFile(recipients []string, path string) ([]string, error) {
	if path == "" {
		return recipients, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading recipients: %w", err)
	}
	recipients = slices.Clone(recipients)
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			recipients = append(recipients, line)
		}
	}
	return recipients, nil
}

// writeNew writes a file that is there whole or not at all, and readable by its owner only.
func writeNew(path string, write func(io.Writer) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing %s: %w", path, err)
		}
	}()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			err = errors.New("there is such a file already; it is not overwritten")
		}
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	out := bufio.NewWriterSize(f, 1<<20)
	err = write(out)
	if err == nil {
		err = errors.Join(out.Flush(), f.Sync())
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil // the file is there
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func describeBackup(w io.Writer, done, path string, r api.BackupReport) error {
	_, err := fmt.Fprintf(w, "%s %s: %s with %s, %s with %s\n", done, path,
		counted(r.Keys, "master key"), counted(r.Versions, "living version"), counted(r.Databases, "database"), counted(r.NamedKeys, "data key version"))
	return err
}

// openable is what verify and restore read.
type openable struct {
	path       string
	identities []age.Identity
}

// readIdentities reads the file that age-keygen has written. It should be nobody else's to
// read, but where a restore is needed that is no reason to refuse it.
func (s *session) readIdentities(path string) ([]age.Identity, error) {
	if path == "" {
		return nil, &usageError{msg: "which identity opens it? --identity FILE, as age-keygen has written it"}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the identity: %w", err)
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Mode().Perm()&0o077 != 0 {
		fmt.Fprintf(s.Err, "kmsd: others may read the identity %s, its mode is %04o (chmod 600)\n", path, info.Mode().Perm())
	}
	ids, err := age.ParseIdentities(f)
	if err != nil { // its text may quote the secret
		return nil, fmt.Errorf("reading the identity: %s has a line that is no identity of age (AGE-SECRET-KEY-1…)", path)
	}
	return ids, nil
}

func (o openable) open() (io.ReadCloser, error) {
	f, err := os.Open(o.path)
	if err != nil {
		return nil, fmt.Errorf("opening the backup: %w", err)
	}
	return f, nil
}

// counting draws how much of the work on keys is done, for a person, twice a second at
// most. end takes the line away.
func (s *session) counting(what string) (progress func(done, total int), end func()) {
	if !terminal(s.Err) {
		return nil, func() {}
	}
	const home, clearLine = "\r", "\x1b[K"
	var mu sync.Mutex // guards drawn and shown
	var drawn time.Time
	shown := 0
	began := time.Now()
	progress = func(done, total int) {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(drawn) < lookInterval || done < shown {
			return
		}
		drawn, shown = time.Now(), done
		p := api.Progress{Done: done, Total: total, Rate: float64(done) / time.Since(began).Seconds()}
		if p.Rate > 0 {
			p.Left = api.Duration(float64(total-done) / p.Rate * float64(time.Second))
		}
		fmt.Fprint(s.Err, home+clip(what+"  "+bar(p)+"  "+progressText(p), s.width())+clearLine)
	}
	return progress, func() { fmt.Fprint(s.Err, home+clearLine) }
}

// reading makes a command that reads a backup: FILE, --identity and -c.
func (s *session) reading(cmd *cobra.Command, run func(ctx context.Context, cmd *cobra.Command, o openable, config string) error) *cobra.Command {
	var identity, path string
	cmd.Args = oneArg("FILE")
	cmd.Flags().StringVar(&identity, "identity", "", "file with the identity of a recipient, as age-keygen has written it")
	addConfigFlag(cmd, &path)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ids, err := s.readIdentities(identity)
		if err != nil {
			return err
		}
		return run(cmd.Context(), cmd, openable{args[0], ids}, path)
	}
	return cmd
}
