package app

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"kmsd/cmd/kmsd/internal/auth"
	"kmsd/cmd/kmsd/internal/config"
	"kmsd/cmd/kmsd/internal/daemon"
	"kmsd/kms/api"
)

// checked is what a check has found: faults, or the members, and warnings with both.
type checked struct {
	Faults   config.Faults   `json:"faults"`
	Warnings []string        `json:"warnings"`
	Members  []checkedMember `json:"members"`
}

type checkedMember struct {
	Group  string    `json:"group"`
	Name   string    `json:"name"`
	Driver string    `json:"driver"` // path of the program
	SHA256 string    `json:"sha256"`
	Token  api.Token `json:"token"` // empty with --offline
}

func newCheck(s *session) *cobra.Command {
	var path string
	var offline bool
	cmd := &cobra.Command{
		Use:   "check -c FILE",
		Short: "List every fault of a configuration, with its line",
		Long: "List every fault of a configuration, with its line. Unless --offline, it also starts every driver\n" +
			"and logs in as a server would; nothing is written to a token, but a wrong PIN costs one try.\n" +
			"Without faults it prints the drivers with their SHA-256 and the tokens that were found.\n\n" +
			"What a Luna client's Chrystoki.conf does to a member is looked at too, and what a token warns of.\n" +
			"Warnings do not change the exit code: they are on stderr, and with -o json the list \"warnings\" of\n" +
			"the answer.",
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if path == "" {
				return errNoConfig()
			}
			out, err := s.check(cmd, path, offline)
			return s.tellChecked(path, out, err)
		},
	}
	addConfigFlag(cmd, &path)
	cmd.Flags().BoolVar(&offline, "offline", false, "do not start drivers and do not log in")
	config.AddFlags(cmd.Flags())
	return cmd
}

// tellChecked prints what a check has found. Faults are a part of that for a program;
// for a person they are an error like any other.
func (s *session) tellChecked(path string, out checked, err error) error {
	if s.output != "json" {
		for _, w := range out.Warnings {
			fmt.Fprintln(s.Err, "kmsd: "+clean(w))
		}
	}
	switch {
	case err == nil:
		return s.printChecked(out, path)
	case s.output != "json" || !errors.As(err, &out.Faults):
		return err
	}
	out.Members = []checkedMember{}
	if err := s.printJSON(out); err != nil {
		return err
	}
	return errSilent
}

// check looks at a configuration. Its error is of type config.Faults unless it could
// not look at all.
func (s *session) check(cmd *cobra.Command, path string, offline bool) (checked, error) {
	out := checked{Faults: config.Faults{}, Warnings: []string{}}
	cfg, err := config.Inspect(path, config.Options{Flags: cmd.Flags(), Modules: true})
	var faults config.Faults
	if err != nil && (cfg == nil || !errors.As(err, &faults)) {
		return out, err
	}
	out.Warnings = append(out.Warnings, cfg.Warnings...)
	tokens := map[string]api.Token{}
	if !offline {
		faults = append(faults, memberFaults(cmd.Context(), cfg.Sound(), tokens)...)
		out.Warnings = append(out.Warnings, tokenWarnings(cfg, tokens)...)
	}
	if err := cmd.Context().Err(); err != nil {
		return out, fmt.Errorf("checking %s: %w", path, err)
	}
	here, elsewhere := principalFaults(cfg, faults)
	faults = append(faults, here...)
	faults.Sort()
	if faults = append(faults, elsewhere...); len(faults) > 0 {
		return out, faults
	}
	out.Members, err = checkedMembers(cfg, tokens)
	return out, err
}

// principalFaults looks at who may do what. A file that cannot be read at all is a
// fault of the line that names it, unless that has one already.
func principalFaults(cfg *config.Config, known config.Faults) (here, elsewhere config.Faults) {
	_, err := auth.New(auth.Config{Tokens: cfg.Auth.Tokens, Policies: cfg.Auth.Policies})
	var faults auth.Faults
	if err != nil && !errors.As(err, &faults) {
		return config.Faults{cfg.Fault("auth", err.Error())}, nil
	}
	for _, f := range faults {
		key := "auth.tokens"
		if f.File == cfg.Auth.Policies {
			key = "auth.policies"
		}
		switch {
		case f.Line > 0:
			elsewhere = append(elsewhere, config.Fault{Origin: fmt.Sprintf("%s:%d", f.File, f.Line), Msg: f.Msg})
		case !known.Has(key):
			here = append(here, cfg.Fault(key, f.String()))
		}
	}
	return here, elsewhere
}

// memberFaults starts the drivers and says of every member that does not serve why.
// The tokens of the others are kept, by group and member.
func memberFaults(ctx context.Context, cfg *config.Config, tokens map[string]api.Token) config.Faults {
	if len(cfg.Groups) == 0 {
		return nil
	}
	groups, err := daemon.Probe(ctx, cfg)
	if err != nil {
		return config.Faults{cfg.Fault("groups", err.Error())}
	}
	var faults config.Faults
	for i, g := range groups {
		for j, m := range g.Members {
			switch m.State {
			case api.MemberActive, api.MemberStandby, api.MemberSyncing:
				tokens[g.Name+"/"+m.Name] = m.Token
			default:
				faults = append(faults, cfg.MemberFault(cfg.Groups[i].Members[j], fmt.Sprintf("%s is %s: %s", m.Name, m.State, m.Reason)))
			}
		}
	}
	return faults
}

// tokenWarnings says what tokens that were found warn of.
func tokenWarnings(cfg *config.Config, tokens map[string]api.Token) (all []string) {
	for _, g := range cfg.Groups {
		for _, m := range g.Members {
			for _, f := range tokens[g.Name+"/"+m.Name].Facts {
				if f.Warning {
					all = append(all, cfg.MemberFault(m, fmt.Sprintf("%s warns: %s: %s", m.Name, f.Name, f.Value)).String())
				}
			}
		}
	}
	return all
}

// checkedMembers lists the members of a sound configuration.
func checkedMembers(cfg *config.Config, tokens map[string]api.Token) ([]checkedMember, error) {
	out := []checkedMember{}
	for _, g := range cfg.Groups {
		for _, m := range g.Members {
			program := cfg.DriverPath(m.Driver)
			sum, err := config.Sum(program)
			if err != nil {
				return nil, err
			}
			out = append(out, checkedMember{g.Name, m.Name, program, sum, tokens[g.Name+"/"+m.Name]})
		}
	}
	return out, nil
}

func (s *session) printChecked(out checked, path string) error {
	return s.print(out, func(w io.Writer) error {
		t := newTable(w, "group", "member", "token", "serial", "sha256 of its driver", "driver")
		for _, m := range out.Members {
			t.row(m.Group, m.Name, m.Token.Label, m.Token.Serial, m.SHA256, m.Driver)
		}
		if err := t.writeTo(w); err != nil {
			return err
		}
		_, err := fmt.Fprintf(w, "%s has no faults\n", path)
		return err
	})
}
