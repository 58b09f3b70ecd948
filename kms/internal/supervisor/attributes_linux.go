package supervisor

import "syscall"

// attributes makes the kernel end the driver with its parent, even a parent that
// was killed and a driver that is stopped. Pdeathsig is sent when the thread that
// forked ends, not the process: osProcess keeps that thread. A process group of its
// own keeps a Ctrl-C at the daemon's terminal from the driver.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
}
