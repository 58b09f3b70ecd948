// Command kmsd-driver-softhsm answers: what is peculiar about SoftHSM 2?
//
// kmsd starts it, one process for each token. The one thing a person or a script
// may ask of it is a new token:
//
//	kmsd-driver-softhsm init-token < request.json
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
		Quirks: quirks(), Version: version, InitToken: true,
		Advice: "to make a token, give a JSON request to: kmsd-driver-softhsm init-token",
	}.Run()
}
