package p11

import (
	"os"
	"syscall"
	"time"
)

// A library whose tokens share files may not find a token, or crash, while another
// process logs in to a sister of it: SoftHSM 2.6.1 writes the token's file anew at each
// login, and every process reads the files of all tokens when it starts. So drivers
// of one machine keep out of each other's way with a lock on a file that they all know.

// Patience bounds the wait: a driver that hangs while it holds the lock must not
// keep the others from their tokens.
const (
	apartPatience = 2 * time.Second
	apartPoll     = 5 * time.Millisecond
)

// apart is this process's part in the lock. The zero value, and one whose file cannot
// be opened, locks nothing: it is better to open the token unprotected than not at all.
type apart struct{ file *os.File }

func (s settings) apart() apart {
	if s.lock == "" {
		return apart{}
	}
	f, err := os.Open(s.lock)
	if err != nil {
		return apart{}
	}
	return apart{f}
}

// reading waits until nobody writes; many read at a time.
func (a apart) reading() { a.wait(syscall.LOCK_SH) }

// writing waits until nobody reads or writes.
func (a apart) writing() { a.wait(syscall.LOCK_EX) }

func (a apart) wait(how int) {
	if a.file == nil {
		return
	}
	_ = syscall.Flock(int(a.file.Fd()), syscall.LOCK_UN) // two that hold it for reading would wait for each other
	for begin := time.Now(); time.Since(begin) < apartPatience; time.Sleep(apartPoll) {
		if err := syscall.Flock(int(a.file.Fd()), how|syscall.LOCK_NB); err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			return
		}
	}
}

// end gives the lock back. It ends with the process, too.
func (a apart) end() {
	if a.file != nil {
		_ = a.file.Close()
	}
}
