package client

// ReadEvents reads a stream of events.
var ReadEvents = readEvents

// Delay is the pause before another attempt.
var Delay = delay
