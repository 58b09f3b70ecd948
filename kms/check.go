package kms

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
)

const (
	defaultGroup = "default"
	sha256Size   = 32 // bytes
	minDomain    = 32 // bytes of a domain secret
)

// checked returns a copy of c with its zero values replaced, or all its faults at
// once.
func (c Config) checked() (Config, error) {
	c.Groups, c.Formats = slices.Clone(c.Groups), maps.Clone(c.Formats)
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	var faults []error
	if c.Catalog == nil {
		faults = append(faults, errors.New("no catalog"))
	}
	if len(c.Groups) == 0 {
		faults = append(faults, errors.New("no group"))
	}
	seen := make(map[string]bool, len(c.Groups))
	for i, g := range c.Groups {
		g = g.withDefaults()
		c.Groups[i] = g
		if seen[g.Name] {
			faults = append(faults, fmt.Errorf("two groups are named %q", g.Name))
		}
		seen[g.Name] = true
		for _, fault := range g.faults(c.Insecure, c.DriverDir) {
			faults = append(faults, fmt.Errorf("group %q: %w", g.Name, fault))
		}
	}
	for _, database := range slices.Sorted(maps.Keys(c.Formats)) {
		if f := c.Formats[database]; f != "" && f != api.FormatMariaDB {
			faults = append(faults, fmt.Errorf("database %q: there is no format %q", database, f))
		}
	}
	return c, errors.Join(faults...)
}

func (g GroupConfig) withDefaults() GroupConfig {
	if g.Name == "" {
		g.Name = defaultGroup
	}
	g.Members = slices.Clone(g.Members)
	for i := range g.Members {
		g.Members[i].Settings = maps.Clone(g.Members[i].Settings)
	}
	return g
}

// faults returns what is wrong with a group, but for what package group finds
// itself: names, numbers and durations of members.
func (g GroupConfig) faults(insecure bool, driverDir string) []error {
	var faults []error
	if g.Domain == nil {
		faults = append(faults, errors.New("no domain secret"))
	}
	if strings.Contains(g.Name, "/") {
		faults = append(faults, errors.New("a slash in its name"))
	}
	if g.MinCopies < 0 || g.MinCopies > len(g.Members) {
		faults = append(faults, fmt.Errorf("min_copies is %d, want 1 to the number of members, %d", g.MinCopies, len(g.Members)))
	}
	for _, m := range g.Members {
		if strings.Contains(m.Name, "/") {
			faults = append(faults, fmt.Errorf("member %q: a slash in its name", m.Name))
		}
		if m.Open != nil {
			continue
		}
		for _, fault := range m.processFaults(insecure, driverDir) {
			faults = append(faults, fmt.Errorf("member %q: %w", m.Name, fault))
		}
	}
	return faults
}

// processFaults returns what is wrong with a member that has a driver process.
func (m MemberConfig) processFaults(insecure bool, driverDir string) []error {
	var faults []error
	if driverDir == "" {
		faults = append(faults, errors.New("no driver directory to run its driver from"))
	}
	if m.Driver == "" || strings.ContainsAny(m.Driver, "/\\\x00") {
		faults = append(faults, fmt.Errorf("driver %q is not the name of a driver", m.Driver))
	}
	if m.PIN == nil {
		faults = append(faults, errors.New("no PIN"))
	}
	sum, err := hex.DecodeString(m.SHA256)
	switch {
	case m.SHA256 == "" && !insecure:
		faults = append(faults, errors.New("no SHA-256 of its driver; without one a driver runs only when insecure is set"))
	case m.SHA256 != "" && (err != nil || len(sum) != sha256Size):
		faults = append(faults, fmt.Errorf("the SHA-256 of its driver is not %d hexadecimal digits", 2*sha256Size))
	}
	return faults
}
