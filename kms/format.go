package kms

import "maps"

// SetFormats says anew what the data keys of databases must be, as Config.Formats has
// done at the start. Versions that are there already stay as they are. It may be called
// at any time.
func (k *KMS) SetFormats(formats map[string]string) {
	copied := maps.Clone(formats)
	k.formats.Store(&copied)
}

// format is what the data keys of a database must be; "": anything.
func (k *KMS) format(database string) string { return (*k.formats.Load())[database] }
