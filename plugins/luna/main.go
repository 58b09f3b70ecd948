// Command kmsd-driver-luna answers: what is peculiar about a Thales Luna?
//
// kmsd starts it, one process for each partition. It has no command to make a partition:
// that is done with Thales' lunacm.
package main

import (
	"os"

	"kmsd/plugins/internal/p11"
)

// version is set when a release is built.
var version = "dev"

func main() { os.Exit(run()) }

func run() int {
	return p11.Program{
		Quirks: quirks(), Version: version,
		Advice: "partitions are made with lunacm (partition init, role init), not here",
	}.Run()
}
