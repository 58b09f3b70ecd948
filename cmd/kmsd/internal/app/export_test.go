package app

// ExitOf is exitOf, for its table.
var ExitOf = exitOf

// Verdict is verdict, for its table.
var Verdict = verdict

// Clean is clean, for its table.
var Clean = clean
