// Command driver answers: what if the driver of an HSM cannot even start?
//
// It stands before the real driver: as kmsd-driver-chaos-softhsm-NAME it becomes
// kmsd-driver-softhsm, which is beside it, unless the file that is named as itself with
// ".fault" behind it says that it is to misbehave first. The fault suite runs one copy for
// each member.
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	order, err := os.ReadFile(self + ".fault")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	fault, argument, _ := strings.Cut(strings.TrimSpace(string(order)), " ")
	switch fault {
	case "":
	case "crash":
		return errors.New("crashing at the start, as was asked for")
	case "slow":
		d, err := time.ParseDuration(argument)
		if err != nil {
			return err
		}
		time.Sleep(d)
	case "garbage":
		fmt.Println("\x00\xff|this|is no|handshake\x01")
		time.Sleep(time.Hour) // whoever has started it will end it
	case "version":
		// The handshake of go-plugin: core version, protocol version, network, address,
		// kind. This one is from a future in which the protocol is another.
		fmt.Println("1|9999|unix|/nowhere/to/be/found|grpc|")
		time.Sleep(time.Hour)
	default:
		return fmt.Errorf("no fault is named %q", fault)
	}
	kind, ok := strings.CutPrefix(filepath.Base(self), "kmsd-driver-chaos-")
	if !ok {
		return fmt.Errorf("the name %s does not say which driver to become", self)
	}
	kind, _, _ = strings.Cut(kind, "-")
	real := filepath.Join(filepath.Dir(self), "kmsd-driver-"+kind)
	// The name stays this one's, so that whoever looks for the process finds the
	// member's.
	return syscall.Exec(real, os.Args, os.Environ())
}
