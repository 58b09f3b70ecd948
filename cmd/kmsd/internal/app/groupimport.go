package app

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/spf13/cobra"

	"kmsd/cmd/kmsd/internal/chrystoki"
)

func newGroupImport(s *session) *cobra.Command {
	return &cobra.Command{
		Use:   "import-chrystoki FILE",
		Short: "Print the HA groups of a Luna client's Chrystoki.conf as a configuration of kmsd",
		Long: "Print the HA groups of a Luna client's Chrystoki.conf as a configuration of kmsd, as YAML whose comments\n" +
			"say where each value comes from, what has no counterpart, and what is left to fill in: the files of the\n" +
			"PINs and of kmsd's domain secret, and the SHA-256 of the driver. With -o json the same, the comments as a\n" +
			"list of notes.\n\n" +
			"It reads FILE and writes to stdout. It talks to no server and to no HSM, and changes nothing.",
		Example: "  kmsd group import-chrystoki /etc/Chrystoki.conf > groups.yaml",
		Args:    oneArg("FILE"),
		RunE: func(_ *cobra.Command, args []string) error {
			file, err := chrystoki.Load(args[0])
			if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
				return fmt.Errorf("reading %s: %w", pe.Path, pe.Err)
			} else if err != nil {
				return err
			}
			out, err := file.Translate()
			if err != nil {
				return err
			}
			return s.print(out, func(w io.Writer) error { return out.WriteYAML(w) })
		},
	}
}
