package chaos_test

import "syscall"

// mount mounts a file system in memory.
func mount(path, size string) (unmount func() error, err error) {
	if err := syscall.Mount("tmpfs", path, "tmpfs", 0, "mode=0700,size="+size); err != nil {
		return nil, err
	}
	return func() error { return syscall.Unmount(path, syscall.MNT_DETACH) }, nil // also while a file is open
}
