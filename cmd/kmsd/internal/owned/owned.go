// Package owned answers: whose file is this?
package owned

import (
	"io/fs"
	"os"
	"syscall"
)

// ByUs tells whether a file belongs to root or to the user of this process. What
// belongs to anybody else may hold something different in the next moment, whatever
// its mode is.
func ByUs(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && (st.Uid == 0 || int(st.Uid) == os.Geteuid())
}
