package kms

import (
	"context"
	"time"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/pluginproto"
)

// Config is what Open needs. It is copied; Open never writes to it.
type Config struct {
	// Catalog is where keys are remembered, for example boltcat.Open(path). The
	// caller opens it and closes it after Close.
	Catalog catalog.Store

	// DriverDir holds the driver programs, kmsd-driver-NAME each.
	DriverDir string

	// Groups are the HSM groups, at least one. A key without a group goes to the
	// first.
	Groups []GroupConfig

	// Logger gets everything that the service and its drivers say. Nil means
	// nothing is logged.
	Logger hclog.Logger

	// Enlist turns the description of a member that is added or replaced at run time
	// into its configuration, or refuses it. Descriptions are kept in the catalog, so it
	// is asked again at the next Open. Nil: members cannot be added or replaced at run time,
	// other than by Reconfigure.
	Enlist func(group string, spec api.MemberSpec) (MemberConfig, error)

	// Formats says for databases, by name, what their data keys must be; see
	// api.FormatMariaDB. Nil: anything.
	Formats map[string]string

	// Insecure lets drivers run whose SHA-256 is not given. For development.
	Insecure bool

	wraps wrapLimits // zero: as is safe; a test sets others
}

// GroupConfig describes a group of HSMs that hold the same keys.
type GroupConfig struct {
	Name string // "" means "default"

	// Domain reads the domain secret, at least 32 random bytes, the same for every
	// member.
	Domain Secret

	// MinCopies is how many members must hold a new key before it is acknowledged.
	// Zero means 2, or 1 while the group has one member.
	MinCopies int

	// CommandTimeout drops a member that neither answers nor sends heartbeats for
	// this long. Zero means 20 s, the default of ReceiveTimeout in the Luna client.
	CommandTimeout time.Duration

	// ProbeInterval is the time between real operations on an idle member. Zero
	// means 2 s.
	ProbeInterval time.Duration

	// NoHedge keeps an unanswered command on its one member until that fails.
	NoHedge bool

	// PlainCount chooses members by the number of commands they have, as Luna does, and
	// not by what the commands cost.
	PlainCount bool

	Recovery RecoveryConfig
	Members  []MemberConfig // 1 to 32
}

// RecoveryConfig says how a lost member is brought back. The zero value tries for
// ever by itself, first after 250 ms, then less and less often, at least once a minute.
type RecoveryConfig struct {
	Manual   bool          // only on request
	Interval time.Duration // longest pause between attempts; zero means 60 s
	Retries  int           // attempts before giving up; zero and -1 mean never
}

// MemberConfig describes one HSM.
type MemberConfig struct {
	Name    string
	Driver  string // runs DriverDir/kmsd-driver-DRIVER
	SHA256  string // of the driver program, hexadecimal; required unless Config.Insecure
	Standby bool   // in step, but serves only when no active member is left

	// PIN reads the PIN of the Crypto Officer. It is read anew for every start of
	// the driver.
	PIN Secret

	// Settings are the driver's: module, token_label, ...
	Settings map[string]string

	// Source is anything else that tells this entry from an earlier one of the same
	// name, such as the path of the PIN's file. A change at run time lasts until the
	// entry changes.
	Source string

	// Open, when set, is used in place of a driver process: a driver inside this
	// one, for tests and programs that bring their own.
	Open func(ctx context.Context) (pluginproto.Driver, error)
}

// Secret reads a secret anew. The caller wipes what it gets.
type Secret func(ctx context.Context) ([]byte, error)
