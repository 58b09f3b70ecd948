package app

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"kmsd/cmd/kmsd/internal/audit"
)

func newAudit(s *session) *cobra.Command {
	return family("audit", "Look at the audit log", newAuditVerify(s))
}

func newAuditVerify(s *session) *cobra.Command {
	return &cobra.Command{
		Use:   "verify FILE",
		Short: "Check the hash chain of an audit log",
		Long: "Check the hash chain of an audit log. Whole lines that are missing at the end cannot be seen\n" +
			"in the file itself: compare LAST and HEAD with what was printed before.",
		Args: oneArg("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			f, err := os.Open(args[0])
			if err != nil {
				return fmt.Errorf("verifying the audit log: %w", err)
			}
			defer f.Close()
			rep, broken := audit.Verify(f)
			if broken != nil && rep.Records == 0 && s.output != "json" {
				return fmt.Errorf("verifying %s: %w", args[0], broken) // there is nothing to report
			}
			err = s.print(rep, func(w io.Writer) error {
				fmt.Fprintf(w, "records:    %d, number %d to %d\n", rep.Records, rep.First, rep.Last)
				fmt.Fprintf(w, "time:       %s to %s\n", when(rep.From), when(rep.To))
				fmt.Fprintf(w, "recovered:  %d cut lines, %d bytes\n", rep.Recoveries, rep.CutBytes)
				_, err := fmt.Fprintf(w, "head:       %s\n", rep.Head)
				return err
			})
			if err != nil {
				return err
			}
			if broken != nil {
				return fmt.Errorf("verifying %s: %w", args[0], broken)
			}
			return nil
		},
	}
}
