package app

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"kmsd/kms/api"
)

// specFlags describe a member that joins.
type specFlags struct {
	spec     api.MemberSpec
	module   string
	settings []string // NAME=VALUE
}

// specNames are the flags of a specFlags.
var specNames = []string{"driver", "sha256", "pin-file", "standby", "module", "setting"} // never written to

func (f *specFlags) define(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.spec.Driver, "driver", "", "driver: softhsm or luna")
	fl.StringVar(&f.spec.SHA256, "sha256", "", "SHA-256 of the driver program (default: the one in the configuration)")
	fl.StringVar(&f.spec.PIN.File, "pin-file", "", "file with the PIN, on the host of kmsd; a PIN itself is never sent")
	fl.BoolVar(&f.spec.Standby, "standby", false, "serve only when no active member is left")
	fl.StringVar(&f.module, "module", "", "PKCS#11 library, on the host of kmsd; short for --setting module=PATH")
	completeFlag(cmd, "driver", cobra.FixedCompletions([]string{"softhsm", "luna"}, cobra.ShellCompDirectiveNoFileComp))
	fl.StringArrayVar(&f.settings, "setting", nil, "setting of the driver, NAME=VALUE; can be given many times")
}

// member returns what the flags say of the member of that name.
func (f *specFlags) member(name string) (api.MemberSpec, error) {
	spec := f.spec
	spec.Name, spec.Settings = name, make(map[string]string)
	switch {
	case spec.Driver == "":
		return spec, &usageError{msg: "--driver is missing: which driver speaks to the HSM?"}
	case spec.PIN.File == "":
		return spec, &usageError{msg: "--pin-file is missing: where does kmsd read the PIN?"}
	case !filepath.IsAbs(spec.PIN.File):
		return spec, &usageError{msg: fmt.Sprintf("--pin-file %s is not absolute; kmsd reads it on its own host", spec.PIN.File)}
	}
	for _, setting := range f.settings {
		key, value, ok := strings.Cut(setting, "=")
		if !ok || key == "" {
			return spec, &usageError{msg: fmt.Sprintf("--setting %q is not NAME=VALUE", setting)}
		}
		if _, twice := spec.Settings[key]; twice {
			return spec, &usageError{msg: fmt.Sprintf("--setting %s is given twice", key)}
		}
		spec.Settings[key] = value
	}
	if _, twice := spec.Settings["module"]; twice && f.module != "" {
		return spec, &usageError{msg: "--module and --setting module say the same thing; give one"}
	}
	if f.module != "" {
		spec.Settings["module"] = f.module
	}
	return spec, nil
}

func newMemberAdd(s *session) *cobra.Command {
	var f memberFlags
	var sf specFlags
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Take an HSM into a group while it serves",
		Long: "Take an HSM into a group while it serves. Its token, mechanisms and domain are checked, a canary\n" +
			"key is cloned to it and compared, and every key is cloned. The command ends when the member is\n" +
			"in step; if it does not get there, the group is as it was and the error says what differs.\n\n" +
			"Driver and library have to be ones that the configuration of kmsd uses already, and the PIN file\n" +
			"has to lie beside those of the other members and be readable by kmsd alone. Any other HSM is put\n" +
			"into kmsd.yaml, and kmsd told to read it anew.",
		Example: "  kmsd member add hsm-d --driver softhsm --pin-file /etc/kmsd/hsm-d.pin \\\n" +
			"      --module /usr/lib/softhsm/libsofthsm2.so --setting token_label=hsm-d",
		Args:              oneArg("member NAME"),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f.define(cmd, "")
	completeFlag(cmd, "group", s.completeGroupFlag)
	cmd.Flags().Lookup("group").Usage = "group that it joins (default: the only one)"
	sf.define(cmd)
	return s.connected(cmd, func(cmd *cobra.Command, svc service, args []string) error {
		spec, err := sf.member(args[0])
		if err != nil {
			return err
		}
		ctx, cancel, err := within(cmd.Context(), f.timeout)
		if err != nil {
			return err
		}
		defer cancel()
		group, err := theGroup(ctx, svc, f.group)
		if err != nil {
			return err
		}
		var m api.Member
		err = s.watching(ctx, svc, group, spec.Name, func(ctx context.Context) (err error) {
			m, err = svc.AddMember(ctx, group, spec)
			return err
		})
		if err != nil {
			return err
		}
		return s.printMember(m, "; it is in group "+group)
	})
}

func newMemberReplace(s *session) *cobra.Command {
	var f memberFlags
	var sf specFlags
	cmd := &cobra.Command{
		Use:   "replace NAME",
		Short: "Accept another token, or another HSM, under the name of a member",
		Long: "Accept another token under the name of a member: one that was re-initialised, so that its serial\n" +
			"or its domain is another. With --driver and --pin-file and what else member add takes, another\n" +
			"HSM takes the member's place. It is checked as a new one is, and gets every key.",
		Example: "  kmsd member replace hsm-c\n" +
			"  kmsd member replace hsm-c --driver softhsm --pin-file /etc/kmsd/hsm-c.pin --setting token_label=new-c",
	}
	f.define(cmd, "")
	sf.define(cmd)
	return s.onMember(cmd, &f, func(ctx context.Context, svc service, group, name string) error {
		var spec *api.MemberSpec
		for _, flag := range specNames {
			if cmd.Flags().Changed(flag) {
				described, err := sf.member(name)
				if err != nil {
					return err
				}
				spec = &described
				break
			}
		}
		var m api.Member
		err := s.watching(ctx, svc, group, name, func(ctx context.Context) (err error) {
			m, err = svc.ReplaceMember(ctx, group, name, spec)
			return err
		})
		if err != nil {
			return err
		}
		return s.printMember(m, fmt.Sprintf("; its token is %s, serial %s", m.Token.Label, m.Token.Serial))
	})
}
