package app

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kmsd/kms/api"
)

func newKey(s *session) *cobra.Command {
	return family("key", "Make, list, rotate and destroy master keys",
		newKeyCreate(s), newKeyList(s), newKeyShow(s), newKeyRotate(s),
		s.versionCommand(api.ActionDisable, "disable NAME", "Refuse every use of a key, or of one version, until it is enabled", api.Service.Disable),
		s.versionCommand(api.ActionEnable, "enable NAME", "Let a disabled key, or version, be used again", api.Service.Enable),
		newKeyDestroy(s),
		s.versionCommand(api.ActionRestore, "restore NAME", "Take a scheduled destruction back, of a key or of one version", api.Service.Restore),
		newKeyVerify(s),
	)
}

// keyed is a command on one key that is there.
func (s *session) keyed(use, short string, run func(ctx context.Context, svc service, name string) error) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: oneArg("key NAME"), ValidArgsFunction: s.completeKeys}
	return s.connected(cmd, func(cmd *cobra.Command, svc service, args []string) error {
		return run(cmd.Context(), svc, args[0])
	})
}

// keyCommand is a command that takes a name and answers with the key.
func (s *session) keyCommand(use, short string, do func(service, context.Context, string) (api.Key, error)) *cobra.Command {
	return s.keyed(use, short, func(ctx context.Context, svc service, name string) error {
		key, err := do(svc, ctx, name)
		if err != nil {
			return err
		}
		return s.printKey(key)
	})
}

// versionCommand is a keyCommand that can be about one version alone.
func (s *session) versionCommand(action api.VersionAction, use, short string, do func(api.Service, context.Context, string) (api.Key, error)) *cobra.Command {
	var version int
	var cmd *cobra.Command
	cmd = s.keyCommand(use, short, func(svc service, ctx context.Context, name string) (api.Key, error) {
		one, err := oneVersion(cmd, version)
		switch {
		case err != nil:
			return api.Key{}, err
		case one:
			return svc.ChangeVersion(ctx, name, version, api.VersionChange{Action: action})
		default:
			return do(svc, ctx, name)
		}
	})
	versionFlag(cmd, &version)
	return cmd
}

func versionFlag(cmd *cobra.Command, version *int) {
	cmd.Flags().IntVar(version, "version", 0, "number of the only version that is meant (default: all of the key)")
}

// oneVersion says whether a command is about one version of a key.
func oneVersion(cmd *cobra.Command, version int) (bool, error) {
	if !cmd.Flags().Changed("version") {
		return false, nil
	}
	if version < 1 { // must not be taken for all
		return false, &usageError{msg: fmt.Sprintf("--version %d: versions count from 1", version)}
	}
	return true, nil
}

// keyFlags defines the choices for a key that is made.
func keyFlags(f *pflag.FlagSet, opts *api.KeyOptions, period *time.Duration, types string) {
	f.StringVar(&opts.Type, "type", "", types)
	f.StringVar(&opts.Group, "group", "", "group of HSMs that hold it (default: the first)")
	f.IntVar(&opts.MinCopies, "min-copies", 0, "HSMs that must hold it before the answer (default: the group's)")
	f.BoolVar(&opts.AllowDegraded, "allow-degraded", false, "be content with fewer copies, at least one; this is audited")
	f.DurationVar(period, "rotation-period", 0, "make a new version by itself after this long (default: never)")
}

func newKeyCreate(s *session) *cobra.Command {
	var opts api.KeyOptions
	var period time.Duration
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a key with its version 1 on every active member",
		Long: "Make a key with its version 1 on every active member.\n\n" +
			"aes-256 and aes-128 wrap; rsa-2048, rsa-3072 and rsa-4096 sign and decrypt; ec-p256, ec-p384\nand ec-p521 sign; hmac-sha256 makes MACs.",
		Args: oneArg("key NAME"),
	}
	keyFlags(cmd.Flags(), &opts, &period, "aes-256 (default), aes-128, rsa-2048, ec-p256, ...")
	return s.connected(cmd, func(cmd *cobra.Command, svc service, args []string) error {
		opts.RotationPeriod = api.Duration(period)
		key, err := svc.CreateMasterKey(cmd.Context(), args[0], opts)
		if err != nil {
			return err
		}
		return s.printKey(key)
	})
}

func newKeyList(s *session) *cobra.Command {
	var prefix string
	cmd := &cobra.Command{Use: "list", Short: "List keys by name", Args: usageArgs(cobra.NoArgs)}
	cmd.Flags().StringVar(&prefix, "prefix", "", "only names that begin with this")
	return s.connected(cmd, func(cmd *cobra.Command, svc service, _ []string) error {
		all := api.KeyPage{Keys: []api.Key{}}
		opts := api.ListOptions{Prefix: prefix, Limit: api.MaxPage}
		for more := true; more; more = opts.After != "" {
			page, err := svc.Keys(cmd.Context(), opts)
			if err != nil {
				return err
			}
			all.Keys = append(all.Keys, page.Keys...)
			opts.After = page.Next
		}
		return s.print(all, func(w io.Writer) error {
			t := newTable(w, "name", "type", "state", "group", "version", "copies", "created")
			for _, k := range all.Keys {
				t.row(k.Name, k.Type, keyState(k.State), k.Group, k.Primary, fewestCopies(k), when(k.Created))
			}
			return t.writeTo(w)
		})
	})
}

func newKeyShow(s *session) *cobra.Command {
	return s.keyCommand("show NAME", "Show a key and its versions", service.Key)
}

func newKeyRotate(s *session) *cobra.Command {
	var opts api.RotateOptions
	cmd := s.keyed("rotate NAME", "Make the next version; old versions still unwrap", func(ctx context.Context, svc service, name string) error {
		v, err := svc.RotateWith(ctx, name, opts)
		if err != nil {
			return err
		}
		return s.print(api.VersionBody{Version: v.Number, Copies: v.Copies}, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "%s: version %d wraps from now on, copies on %s\n", name, v.Number, strings.Join(v.Copies, " "))
			return err
		})
	})
	cmd.Example = "  kmsd key rotate shop"
	cmd.Flags().BoolVar(&opts.AllowDegraded, "allow-degraded", false, "be content with fewer copies, at least one; this is audited")
	return cmd
}

func newKeyDestroy(s *session) *cobra.Command {
	var window time.Duration
	var yes bool
	var version int
	var cmd *cobra.Command
	cmd = s.keyed("destroy NAME", "Schedule the destruction of every version, or of one", func(ctx context.Context, svc service, name string) error {
		if window < 0 {
			return &usageError{msg: "--window is negative"}
		}
		one, err := oneVersion(cmd, version)
		if err != nil {
			return err
		}
		what := name
		if one {
			what = fmt.Sprintf("version %d of %s", version, name)
		}
		if window == 0 && !yes {
			if err := s.confirm(what, name); err != nil {
				return err
			}
		}
		var key api.Key
		if one {
			key, err = svc.ChangeVersion(ctx, name, version, api.VersionChange{Action: api.ActionDestroy, Window: window})
		} else {
			key, err = svc.Destroy(ctx, name, window)
		}
		if err != nil {
			return err
		}
		return s.printKey(key)
	})
	cmd.Long = "Schedule the destruction of every version of a key, or of one. Until the window is over, kmsd key restore\ntakes it back. After that nothing does: what the key has wrapped is lost. A version that wraps a\ndata key of a database is not destroyed; kmsd database rekey frees it."
	versionFlag(cmd, &version)
	cmd.Flags().DurationVar(&window, "window", 720*time.Hour, "how long it can be restored; 0 destroys at once")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask on the terminal before a destruction at once")
	return cmd
}

// confirm asks a person for the name of a key when it, or one of its versions, is about to
// be gone for good. A program is not asked: it has said what it wants.
func (s *session) confirm(what, name string) error {
	if !terminal(s.In) {
		return nil
	}
	fmt.Fprintf(s.Err, "This destroys %s at once, and all that it has wrapped is lost. The name of the key, to go on: ", what)
	answer, err := bufio.NewReader(io.LimitReader(s.In, 1024)).ReadString('\n')
	if err != nil && err != io.EOF {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if strings.TrimSpace(answer) != name {
		return fmt.Errorf("%s was not destroyed", what)
	}
	return nil
}

func newKeyVerify(s *session) *cobra.Command {
	return s.keyed("verify NAME", "Ask every HSM, past all caches, for its copy of every version", func(ctx context.Context, svc service, name string) error {
		v, err := svc.Verify(ctx, name)
		if err != nil {
			return err
		}
		err = s.print(v, func(w io.Writer) error {
			t := newTable(w, "version", "member", "copy", "check value", "why")
			for _, c := range v.Copies {
				t.row(c.Version, c.Member, copyState(c.State), c.CheckValue, c.Error)
			}
			return t.writeTo(w)
		})
		if err != nil {
			return err
		}
		return verdict(v)
	})
}

// verdict is the failure that a verification has found, nil when all is well. What
// could not be asked is not said to be wrong: that is unavailable, and the same
// command may succeed later.
func verdict(v api.Verification) error {
	wrong, unknown := 0, 0
	for _, c := range v.Copies {
		switch c.State {
		case "ok":
		case "unknown":
			unknown++
		default:
			wrong++
		}
	}
	switch {
	case v.OK:
		return nil
	case wrong > 0 || unknown == 0:
		return fmt.Errorf("%s is not on every member as it should be: %d of %d copies are missing or different, %d could not be asked for",
			v.Name, wrong, len(v.Copies), unknown)
	default:
		e := api.NewError(api.CodeUnavailable, fmt.Sprintf("%d of %d copies of %s could not be asked for; the others are as they should be",
			unknown, len(v.Copies), v.Name), nil)
		e.Hint = "see kmsd status; ask again when every member is active"
		return e
	}
}

func (s *session) printKey(key api.Key) error {
	return s.print(key, func(w io.Writer) error {
		fmt.Fprintf(w, "%s: %s, %s, group %s, at least %d copies\n", key.Name, key.Type, key.State, key.Group, key.MinCopies)
		if key.DestroyAt != nil {
			fmt.Fprintf(w, "destroyed after %s; until then: kmsd key restore %s\n", whenPtr(key.DestroyAt), key.Name)
		}
		if key.RotationPeriod > 0 {
			fmt.Fprintf(w, "rotated every %s\n", time.Duration(key.RotationPeriod))
		}
		if len(key.Databases) > 0 {
			fmt.Fprintf(w, "wraps the data keys of %s\n", strings.Join(key.Databases, ", "))
		}
		t := newTable(w, "version", "state", "created", "check value", "wraps", "copies")
		for _, v := range key.Versions {
			number := fmt.Sprint(v.Number)
			if v.Number == key.Primary {
				number += " (wraps)"
			}
			t.row(number, keyState(v.State), when(v.Created), v.CheckValue, v.Wraps, strings.Join(v.Copies, " "))
		}
		return t.writeTo(w)
	})
}

// fewestCopies is the number of copies of the version that has the fewest.
func fewestCopies(k api.Key) string {
	fewest := -1
	for _, v := range k.Versions {
		if v.State != api.StateDestroyed && (fewest < 0 || len(v.Copies) < fewest) {
			fewest = len(v.Copies)
		}
	}
	if fewest < 0 {
		return ""
	}
	return fmt.Sprint(fewest)
}

func keyState(state api.State) cell {
	switch state {
	case api.StateEnabled:
		return cell{string(state), green}
	case api.StateDestroyed, api.StateDestroyScheduled:
		return cell{string(state), red}
	default:
		return cell{string(state), yellow}
	}
}

func copyState(state string) cell {
	switch state {
	case "ok":
		return cell{state, green}
	case "unknown":
		return cell{state, yellow}
	default:
		return cell{state, red}
	}
}
