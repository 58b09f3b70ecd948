package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

// silence is how long kmsd may be away while a command waits for a job, which goes on when
// kmsd comes back.
const silence = time.Minute

func newDatabaseRekey(s *session) *cobra.Command {
	var opts api.RekeyOptions
	var noWait, disable, destroy bool
	cmd := &cobra.Command{
		Use:   "rekey NAME",
		Short: "Make the next version of the master key and wrap every data key under it",
		Long: "Make the next version of a database's master key and wrap every version of every data key under\n" +
			"it. The database is served meanwhile. The job goes on in kmsd, also when this command is\n" +
			"interrupted and when kmsd is started anew; kmsd database show tells how far it is.\n\n" +
			"The exit code is 1 when the job fails, or a data key could not be wrapped anew: that one stays as\n" +
			"it was, and old versions of the master key stay enabled.",
		Example: "  kmsd database rekey shop --disable-old",
	}
	f := cmd.Flags()
	f.BoolVar(&noWait, "no-wait", false, "print the job as soon as it has begun")
	f.BoolVar(&disable, "disable-old", false, "disable the older versions of the master key at the end")
	f.BoolVar(&destroy, "destroy-old", false, "schedule their destruction at the end; they can be restored for 30 days")
	f.BoolVar(&opts.AllowDegraded, "allow-degraded", false, "be content with fewer copies, at least one; this is audited")
	return s.onDatabase(cmd, func(ctx context.Context, svc service, name string) error {
		switch {
		case disable && destroy:
			return &usageError{msg: "--disable-old and --destroy-old exclude each other"}
		case disable:
			opts.Retire = api.RetireDisable
		case destroy:
			opts.Retire = api.RetireDestroy
		}
		job, err := svc.Rekey(ctx, name, opts)
		if err != nil {
			return err
		}
		if !noWait {
			if job, err = s.await(ctx, svc, job); err != nil {
				return err
			}
		}
		if err := s.print(job, func(w io.Writer) error { return writeJob(w, job) }); err != nil {
			return err
		}
		return jobVerdict(job)
	})
}

// await returns a job when it has ended. Meanwhile it shows how far it is, if a person is
// at the other end of stderr.
func (s *session) await(ctx context.Context, svc service, job api.Job) (api.Job, error) {
	const home, clearLine = "\r", "\x1b[K"
	shown := terminal(s.Err)
	if shown {
		defer fmt.Fprint(s.Err, home+clearLine)
	}
	tick := time.NewTicker(lookInterval)
	defer tick.Stop()
	heard := time.Now()
	for !ended(job) {
		if shown {
			fmt.Fprint(s.Err, home+clip(clean(jobLine(job)), s.width())+clearLine)
		}
		select {
		case <-ctx.Done():
			return job, goesOn(job, api.NewError(api.CodeDeadline, "interrupted", ctx.Err()))
		case <-tick.C:
		}
		now, err := svc.Job(ctx, job.ID)
		switch {
		case err == nil:
			job, heard = now, time.Now()
		case ctx.Err() == nil && (!api.AsError(err).Retryable || time.Since(heard) > silence):
			return job, goesOn(job, err)
		}
	}
	return job, nil
}

func ended(job api.Job) bool { return job.State == api.JobDone || job.State == api.JobFailed }

// goesOn says of an error that it has ended the waiting, and not the job.
func goesOn(job api.Job, err error) error {
	e := *api.AsError(err)
	e.Hint = fmt.Sprintf("job %s goes on; kmsd database show %s tells how far it is", job.ID, job.Database)
	return &e
}

// jobLine says on one line how far a job is.
func jobLine(job api.Job) string {
	line := job.Database + "  " + bar(job.Progress) + "  " + progressText(job.Progress)
	if job.Failed > 0 {
		line += ", " + thousands(job.Failed) + " failed"
	}
	if job.State == api.JobWaiting {
		line += ", waiting: " + job.Reason
	}
	return line
}

func writeJob(w io.Writer, job api.Job) error {
	fmt.Fprintf(w, "rekey %s to version %d of %s: %s\n", job.ID, job.Version, clean(job.Key), job.State)
	fmt.Fprintf(w, "data key versions: %s", progressText(job.Progress))
	if job.Failed > 0 {
		fmt.Fprintf(w, ", %s failed", thousands(job.Failed))
	}
	fmt.Fprintln(w)
	if job.Reason != "" {
		fmt.Fprintf(w, "%s\n", clean(job.Reason))
	}
	if len(job.Failures) == 0 {
		return nil
	}
	t := newTable(w, "data key", "version", "why it is as it was")
	for _, f := range job.Failures {
		t.row(idText(f.ID, f.Raw), f.Version, f.Error)
	}
	return t.writeTo(w)
}

// jobVerdict is the failure of a job that has ended, nil when all is well or goes on.
func jobVerdict(job api.Job) error {
	switch {
	case job.State == api.JobFailed:
		return errors.New("the rekey of database " + job.Database + " has failed: " + job.Reason)
	case job.State == api.JobDone && job.Failed > 0:
		return fmt.Errorf("%s of database %s could not be wrapped anew; mend what is said of them above, then rekey again",
			counted(job.Failed, "data key version"), job.Database)
	default:
		return nil
	}
}
