//go:build !linux

package supervisor

import "syscall"

// attributes has nothing to say: drivers are released for Linux only.
func attributes() *syscall.SysProcAttr { return nil }
