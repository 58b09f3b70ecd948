package p11

import "time"

// Quirks is what is peculiar about one kind of HSM. It is plain data and is not
// changed after New.
type Quirks struct {
	// Driver is the name by which status and messages know the driver.
	Driver string

	// Modules are the paths where the library is looked for when the setting
	// module is not given, best first.
	Modules []string

	// Env maps further settings to the environment variable that hands them to
	// the library: {"softhsm_conf": "SOFTHSM2_CONF"}. Their values are paths of
	// files that must be readable.
	Env map[string]string

	// Apart is the setting whose file drivers lock while they open their tokens, for
	// a library that does not bear other processes logging in meanwhile. The file is the
	// library's where the setting is not given. Empty: nothing is locked.
	Apart string

	// FastWorkers and SlowWorkers are how many calls with secret keys and with key
	// pairs the library is given at a time. Zero means 1.
	FastWorkers, SlowWorkers int

	// SessionCopies makes commands with secret keys run on a session copy of the
	// token object. The copy cannot be extracted and dies with its session.
	SessionCopies bool

	// CopyCheck is how long a key is used before its object on the token is looked at
	// again; one that somebody removed from the token by other means, or gave another
	// identity, stays usable for no longer than this. Zero means 1 s.
	CopyCheck time.Duration

	// GCMTagFault is what the library answers to AES-GCM data that does not
	// authenticate. When it is a return value that can also mean trouble with the
	// device, a round trip under the probe key tells the two apart.
	GCMTagFault uint

	// ConfDirs maps settings to environment variables as Env does, for a library that
	// wants the directory of the file. The file's name has to be the one given.
	ConfDirs map[string]ConfDir

	// Users are the values of the setting user and the CKU that each logs in as. The
	// empty name is the one without the setting. Nil: there is no such setting, and
	// CKU_USER logs in.
	Users map[string]uint

	// VirtualModels are models of slots that stand for several tokens at once. They are
	// never used.
	VirtualModels []string

	Codes Codes

	// Extend loads what the library has beside PKCS#11. Nil: nothing. Where it is given,
	// keys are made so that they can never be extracted, and go from token to token by
	// the extension's protocols alone.
	Extend func(module string) (Extension, error)

	// FindsByID says that the token looks for an object by its CKA_ID without reading all
	// of them, so that it is asked about one key rather than looked at as a whole.
	FindsByID bool

	// OnToken makes keys on the token at once, not as session objects that are copied to
	// it, for a library that bears that while others work, and does not bear the copy.
	// What an extension's target does, which puts keys on the token too, keeps nobody
	// waiting then either.
	OnToken bool

	// CallersIV says that an AES-GCM encryption always uses the IV that it is given. Where
	// that is not known, each connection begins with an encryption that shows it.
	CallersIV bool

	// RawOAEP makes OAEP padding be removed here after a raw RSA decryption, for
	// a library that supports OAEP with SHA-1 only.
	RawOAEP bool
}

// ConfDir is an environment variable that names the directory of a file.
type ConfDir struct{ Env, File string }

const defaultCopyCheck = time.Second

func (q Quirks) fastWorkers() int { return max(q.FastWorkers, 1) }
func (q Quirks) slowWorkers() int { return max(q.SlowWorkers, 1) }

// workers is how many sessions there are for work: the lanes', one for probes and
// one for rare calls.
func (q Quirks) workers() int { return q.fastWorkers() + q.slowWorkers() + 2 }

func (q Quirks) copyCheck() time.Duration {
	if q.CopyCheck == 0 {
		return defaultCopyCheck
	}
	return q.CopyCheck
}
