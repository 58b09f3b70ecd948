package app

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// build is what a program knows about its own making.
type build struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Modified bool   `json:"modified,omitempty"` // built from a changed tree
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func thisBuild() build {
	b := build{Version: "(devel)", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	if info.Main.Version != "" {
		b.Version = info.Main.Version
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Revision = s.Value
		case "vcs.modified":
			b.Modified = s.Value == "true"
		}
	}
	return b
}

func newVersion(s *session) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Say which kmsd this is",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			b := thisBuild()
			return s.print(b, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "kmsd %s (%s, %s)\n", b.Version, b.Go, b.Platform)
				return err
			})
		},
	}
}

func newCompletion(s *session) *cobra.Command {
	return &cobra.Command{
		Use:       "completion bash|zsh|fish",
		Short:     "Print a completion script for a shell",
		Long:      "Print a completion script for a shell. For bash:\n\n  source <(kmsd completion bash)",
		Args:      usageArgs(cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs)),
		ValidArgs: []string{"bash", "zsh", "fish"},
		RunE: func(cmd *cobra.Command, args []string) error {
			switch args[0] {
			case "bash":
				return cmd.Root().GenBashCompletionV2(s.Out, true)
			case "zsh":
				return cmd.Root().GenZshCompletion(s.Out)
			default:
				return cmd.Root().GenFishCompletion(s.Out, true)
			}
		},
	}
}

// newTopics are texts that are read with kmsd help TOPIC.
func newTopics() []*cobra.Command {
	return []*cobra.Command{
		{Use: "exit-codes", Short: "What the exit codes mean", Long: exitTopic},
		{Use: "environment", Short: "Variables that kmsd reads", Long: environmentTopic},
		{Use: "configuration", Short: "A configuration file with everything in it", Long: configurationTopic},
	}
}

const environmentTopic = `Commands that talk to a server read

  KMSD_ADDR    https://HOST:PORT or unix:///PATH
  KMSD_CACERT  PEM file of the CA that signed the server's certificate
  KMSD_CERT    PEM file of a client certificate, with
  KMSD_KEY     PEM file of its key
  KMSD_TOKEN   token

Flags win over them. kmsd dev writes a file to source, .kmsd/env.sh.

kmsd serve and kmsd check take every single value of the configuration from a
variable too, which wins over the file: its keys joined with underscores, so
tls.cert is KMSD_TLS_CERT and driver_dir is KMSD_DRIVER_DIR. KMSD_LISTEN is a
list with commas. NO_COLOR=1 turns colour off.
`

const configurationTopic = `listen: ["https://127.0.0.1:8420", "unix:///run/kmsd/kmsd.sock"]
tls:                                 # read again on SIGHUP and when they change
  cert: server.pem
  key: server.key                    # chmod 600
  client_ca: clients.pem             # optional: accept client certificates
catalog: {bolt: {path: /var/lib/kmsd/catalog.db}}
driver_dir: /usr/lib/kmsd/drivers
auth: {tokens: tokens.yaml, policies: policies.yaml}
audit: {file: /var/log/kmsd/audit.jsonl}
log: {level: info}                   # trace, debug, info, warn, error
vault:                               # optional: databases take their keys here, as from a Vault
  listen: "https://127.0.0.1:8421"   # closed while no HSM serves
  mounts:                            # read again on SIGHUP
    mariadb: {database: shop, format: mariadb}    # format: what MariaDB cannot use is refused
    team/db1: {database: erp}
groups:
  - name: default
    domain: {file: domain}           # at least 32 bytes, the same for every member
    min_copies: 2                    # default 2, 1 in a group of one
    balance: cost                    # or count: every command counts the same
    command_timeout: 20s
    probe_interval: 2s
    hedge: true
    recovery: {mode: auto, interval: 60s, retries: -1}    # or mode: manual; -1: no end, 0: none
    members:                         # 1 to 32
      - name: hsm-a
        driver: softhsm              # runs driver_dir/kmsd-driver-softhsm
        sha256: 0123...              # kmsd check prints it
        standby: false
        pin: {file: hsm-a.pin}       # chmod 600; or {env: NAME} or {exec: [PROGRAM, ARG]}
        settings: {token_label: hsm-a, softhsm_conf: /etc/kmsd/softhsm.conf}
# A Thales Luna partition, in a group of its own kind (docs/luna.md):
#     - name: luna-a
#       driver: luna
#       sha256: 0123...
#       pin: {file: luna-a.pin}        # password or challenge secret of the crypto officer
#       settings:
#         token_serial: "1234840370164"
#         chrystoki_conf: /etc/kmsd/luna/Chrystoki.conf    # default: the library's, /etc/Chrystoki.conf
#         module: /usr/safenet/lunaclient/lib/libCryptoki2_64.so    # default: where the client installs it
#         user: crypto-officer         # the default; or crypto-user, who makes and takes no keys
#         cloning: cpv4, cpv3, cpv1    # default: all that the partition offers
`
