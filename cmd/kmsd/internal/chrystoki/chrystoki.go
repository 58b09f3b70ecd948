// Package chrystoki answers: what does a Luna client's Chrystoki.conf say, and what is
// that for kmsd?
//
// The file is sections of settings, one client library reads all of it:
//
//	VirtualToken = {
//	   VirtualToken00Label = payments;
//	   VirtualToken00Members = 154438865287, 154438865288;
//	}
//
// [Load] reads it, [File.Review] says what it does to a driver of kmsd that is given
// it, and [File.Translate] says its HA groups as a configuration of kmsd. Nothing here
// writes to it.
//
// Settings that kmsd has no use for are kept by name only. Among them are secrets
// (AuthTokenClientSecret of a Luna Cloud HSM), so no value of theirs is ever in an
// error or in an output.
package chrystoki

import (
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
)

const (
	// DefaultPath is the file of a client that is told of no other.
	DefaultPath = "/etc/Chrystoki.conf"

	// FileName is what the file has to be called: the library is told its directory.
	FileName = "Chrystoki.conf"
)

// File is what a Chrystoki.conf says. A setting that the file does not have is a zero
// [Value]. A File does not change; anybody may read it concurrently.
type File struct {
	Path string // as it was given to Load or Parse

	// Library is the path of the PKCS#11 library, "" when the file has none. Where the
	// file names the logging library of Thales, it is the one behind that.
	Library Value[string]

	Groups []Group     // by their number
	HAOnly Value[bool] // physical slots are hidden

	Interval Value[time.Duration] // between attempts to recover a member; the client's default is 60s
	Attempts Value[int]           // to recover a member: 0 none (the client's default), -1 no end
	Mode     Value[string]        // activeBasic or activeEnhanced

	ReceiveTimeout         Value[time.Duration] // for an answer of the appliance; the client's default is 20s
	StatusTimeout          Value[time.Duration] // for an answer to a question about the group's state
	FailoverOnDeactivation Value[bool]

	Log   Log
	AppID Mark // of a setting that gives all programs one login; zero when there is none

	Unknown []Mark // settings that kmsd makes nothing of
}

// Log says what the client writes down about its HA groups.
type Log struct {
	Status Value[bool]
	Path   Value[string]
	Length Value[int] // bytes
	Stdout Value[bool]
}

// Group is a Luna HA group, which programs see as one virtual slot.
type Group struct {
	Number      int             // NN of VirtualTokenNN…
	Label       Value[string]   // of the virtual slot
	Serial      Value[string]   // of the virtual slot
	Members     Value[[]string] // serial numbers of partitions, standby members included or not
	Standby     Value[[]string]
	Synchronize Value[bool]
}

// Mark is where a setting stands. The zero Mark is one that the file does not have.
type Mark struct {
	Key  string // section and key as the file spells them: HAConfiguration.HAOnly
	Line int
}

func (m Mark) String() string { return fmt.Sprintf("%s, line %d", m.Key, m.Line) }

// Set says whether the file has the setting.
func (m Mark) Set() bool { return m.Line > 0 }

// Value is a setting and where it stands.
type Value[T any] struct {
	V T
	Mark
}

// Load reads a file. An error that is not one of the file system lists what is wrong
// with the file, each with its line.
func Load(path string) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would block
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	return Parse(path, text)
}
