package api

// The bodies of HTTP requests and answers that are not a parameter or a result of
// [Service] themselves. Both ends use them, so that they cannot disagree.

// CreateBody asks for a new key.
type CreateBody struct {
	Name string `json:"name"`
	KeyOptions
}

// CreateDatabaseBody asks for a new database.
type CreateDatabaseBody struct {
	Name string `json:"name"`
	DatabaseOptions
}

// ItemsBody asks for one wrap, unwrap or rewrap, or for many: either the fields of
// Item are set or Items is.
type ItemsBody struct {
	Item
	Items []Item `json:"items,omitempty"` // at most MaxItems
}

// DataKeysBody asks for one data key or for many.
type DataKeysBody struct {
	DataKeyBody
	Items []DataKeyBody `json:"items,omitempty"` // at most MaxItems
}

// ResultsBody answers an ItemsBody or a DataKeysBody in its own form: the fields
// of Result, or Items in the order of the question. Error is set in items only.
type ResultsBody struct {
	Result
	Items []Result `json:"items,omitempty"`
}

// VersionBody answers a rotation.
type VersionBody struct {
	Version int      `json:"version"`
	Copies  []string `json:"copies"` // members that hold it
}

// ValidBody answers a verify-signature.
type ValidBody struct {
	Valid bool `json:"valid"`
}

// PlaintextBody answers a decrypt.
type PlaintextBody struct {
	Plaintext []byte `json:"plaintext"`
}

// RandomBody answers a request for random bytes.
type RandomBody struct {
	Random []byte `json:"random"`
}

// LogBody answers a request for the HA log.
type LogBody struct {
	Events []Event `json:"events"` // oldest first
}

// ErrorBody is the body of every answer whose HTTP status is not 200.
type ErrorBody struct {
	Error *Error `json:"error"`
}

// TimeoutHeader is the request header in which a client says how long it will
// wait, as a Go duration. It can only shorten the 30 seconds that a request has, but
// for what is asked of groups and members ([Admin]) and a backup: that takes as long as the
// client will wait, and a Sync or a backup without this header as long as the connection lasts.
const TimeoutHeader = "X-Kmsd-Timeout"

// BackupReportHeader is the trailer behind a whole backup, a [BackupReport] as JSON.
// Without it what came before is no backup.
const BackupReportHeader = "X-Kmsd-Backup-Report"

// RequestIDHeader names a request in the answer, in errors, in the log and in the
// audit log. A client may choose the value: 1 to 64 of a-z A-Z 0-9 . _ -.
const RequestIDHeader = "X-Request-Id"

// Limits of a request.
const (
	MaxNameLen   = 128      // bytes of a key's name
	MaxPlaintext = 64 << 10 // bytes that can be wrapped at once
	MaxItems     = 1000     // of one batch
	MaxDataKey   = 1024     // bytes of one data key
	MaxRandom    = 64 << 10 // random bytes at once
	MaxPage      = 1000     // keys or databases of one page
	MaxLog       = 100_000  // events of the HA log at once
)
