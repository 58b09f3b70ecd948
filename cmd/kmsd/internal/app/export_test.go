package app

// ExitOf is exitOf, for its table.
var ExitOf = exitOf
