// Package owned answers: whose file is this?
package owned

import (
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"syscall"
)

// ByUs tells whether a file belongs to root or to the user of this process. What
// belongs to anybody else may hold something different in the next moment, whatever
// its mode is.
func ByUs(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && (st.Uid == 0 || int(st.Uid) == os.Geteuid())
}

// Advice says what to do about a file that is not [ByUs]. Root is told to become its
// owner first of all: the files of a kmsd that has a user of its own must stay that
// user's.
func Advice(info fs.FileInfo) string {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || os.Geteuid() != 0 {
		return "chown it to the user of kmsd"
	}
	owner := strconv.FormatUint(uint64(st.Uid), 10)
	if u, err := user.LookupId(owner); err == nil {
		owner = u.Username
	} else {
		owner = "#" + owner // as sudo -u takes it
	}
	return "if that is the user of kmsd, run this as it: sudo -u " + owner + "; if not, chown it"
}
