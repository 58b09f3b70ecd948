package daemon

// NewBounded makes a listener that takes so many connections and no more.
var NewBounded = newBounded
