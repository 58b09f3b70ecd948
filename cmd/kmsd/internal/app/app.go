// Package app answers: what did the operator type, and what do they get to read?
//
// There is one file for each family of commands. A command parses what was typed,
// asks a [service] and prints the answer; an error goes up to [Main], which
// prints it once and turns it into the exit code.
package app

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"kmsd/kms/client"
	"kmsd/pluginproto"
)

// Streams are what a command reads and writes.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// session is one run of kmsd: what all commands share.
type session struct {
	Streams
	output string // table or json
	conn   client.Settings
}

// Main runs the command line args, without the name of the program, and returns
// the exit code.
func Main(ctx context.Context, args []string, streams Streams) int {
	s := &session{Streams: streams}
	// Before anything is read: nearly every command sees a PIN, a token or a plaintext.
	if err := pluginproto.Harden(); err != nil {
		fmt.Fprintln(s.Err, "kmsd:", err)
		return exitFailed
	}
	root := newRoot(s)
	root.SetArgs(args)
	root.SetIn(s.In)
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitDone
	}
	if wantsJSON(args) { // cobra may have stopped before it came to that flag
		s.output = "json"
	}
	if strings.HasPrefix(err.Error(), "unknown command") { // cobra has no type for it
		err = &usageError{msg: err.Error() + meant(cmd, args)}
	}
	s.printError(cmd, err)
	return exitCode(err)
}

func newRoot(s *session) *cobra.Command {
	root := &cobra.Command{
		Use:           "kmsd",
		Short:         "Master keys in a group of HSMs",
		Long:          "kmsd keeps master keys in a group of HSMs and wraps and unwraps data keys with them.\n\nTo try it: kmsd dev",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          usageArgs(cobra.NoArgs),
		RunE:          needsCommand,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			return s.checkOutput()
		},
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{msg: err.Error()} })
	root.PersistentFlags().StringVarP(&s.output, "output", "o", "table", "table or json")
	s.addFlags(root.PersistentFlags())
	root.AddGroup(
		&cobra.Group{ID: groupServer, Title: "Server:"},
		&cobra.Group{ID: groupKeys, Title: "Keys:"},
		&cobra.Group{ID: groupHSMs, Title: "HSMs:"},
	)
	root.AddCommand(inGroup(groupServer, newDev(s), newServe(s), newCheck(s), newAudit(s), newBackup(s))...)
	root.AddCommand(inGroup(groupKeys, newKey(s), newWrap(s), newUnwrap(s), newRewrap(s), newDataKey(s), newDatabase(s), newBench(s))...)
	root.AddCommand(inGroup(groupHSMs, newStatus(s), newGroup(s), newMember(s))...)
	root.AddCommand(newVersion(s), newCompletion(s))
	root.AddCommand(newTopics()...)
	return root
}

const (
	groupServer = "server"
	groupKeys   = "keys"
	groupHSMs   = "hsms"
)

func inGroup(id string, cmds ...*cobra.Command) []*cobra.Command {
	for _, c := range cmds {
		c.GroupID = id
	}
	return cmds
}

// family is a command that only holds others.
func family(use, short string, cmds ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use + " COMMAND", Short: short, Args: usageArgs(cobra.NoArgs), RunE: needsCommand, DisableFlagsInUseLine: true}
	c.AddCommand(cmds...)
	return c
}

func needsCommand(cmd *cobra.Command, _ []string) error {
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	slices.Sort(names)
	return &usageError{msg: cmd.CommandPath() + " needs a command: " + strings.Join(names, ", ")}
}

// wantsJSON finds -o json in a command line that may not be understood otherwise.
func wantsJSON(args []string) bool {
	for i, arg := range args {
		switch arg {
		case "-ojson", "-o=json", "--output=json":
			return true
		case "-o", "--output":
			return i+1 < len(args) && args[i+1] == "json"
		}
	}
	return false
}

// meant names the commands that are nearly like one that was typed.
func meant(cmd *cobra.Command, args []string) string {
	cmd.SuggestionsMinimumDistance = 2
	for _, arg := range args {
		if near := cmd.SuggestionsFor(arg); len(near) > 0 && !strings.HasPrefix(arg, "-") {
			return "; did you mean " + strings.Join(near, " or ") + "?"
		}
	}
	return ""
}

// usageArgs makes a complaint about arguments a usage error.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return &usageError{msg: err.Error()}
		}
		return nil
	}
}

// oneArg is for commands that want one thing, which the message names.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return &usageError{msg: cmd.CommandPath() + " wants one " + what}
		}
		return nil
	}
}

// usageError is a command line that cannot be understood.
type usageError struct{ msg string }

func (e *usageError) Error() string { return e.msg }

// errSilent ends a command whose output has already said what is wrong.
var errSilent = errors.New("failed")
