package kms

// WithWrapLimits returns a configuration under which a version is warned of, replaced and
// refused after other numbers of wraps.
func (c Config) WithWrapLimits(block, warn, rotate, most uint64) Config {
	c.wraps = wrapLimits{block: block, warn: warn, rotate: rotate, most: most}
	return c
}
