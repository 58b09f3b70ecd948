package daemon

import (
	"io"
	"os"
	"runtime/debug"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/term"
)

// newLogger writes for a person on a terminal, else JSON, one object a line.
func newLogger(w io.Writer, name string) hclog.Logger {
	f, ok := w.(*os.File)
	person := ok && term.IsTerminal(int(f.Fd()))
	opts := &hclog.LoggerOptions{Name: "kmsd", Output: w, Level: level(name), JSONFormat: !person}
	if person {
		opts.Color = hclog.AutoColor
		opts.TimeFormat = "15:04:05.000"
	}
	return hclog.New(opts)
}

// level reads a level that the configuration has checked; "" means info.
func level(name string) hclog.Level {
	if name == "" {
		return hclog.Info
	}
	return hclog.LevelFromString(name)
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
