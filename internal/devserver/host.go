package devserver

import (
	"fmt"
	"os"
)

// OwnHost returns an address of this machine that is for this process alone. A port that
// it finds free there stays free until it takes it itself: other programs keep to
// 127.0.0.1.
func OwnHost() string {
	pid := os.Getpid() // below 2^22
	return fmt.Sprintf("127.%d.%d.%d", 1+pid>>16&0x3f, pid>>8&0xff, pid&0xff)
}
