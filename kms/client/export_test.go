package client

// ReadEvents reads a stream of events.
var ReadEvents = readEvents
