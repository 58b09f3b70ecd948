package auth

// Match is the matching of globs, for fuzzing.
var Match = match
