package daemon

import (
	"fmt"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// maxConnections of one listener is half of the files that the process may have open,
// but no more than mostConnections: whoever opens connections without end must not keep
// kmsd from starting a driver, or from opening its audit log anew.
const mostConnections = 16384

func maxConnections() (int, error) {
	var files unix.Rlimit // package os has raised it to the hard limit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return 0, fmt.Errorf("asking how many files may be open: %w", err)
	}
	return int(min(files.Cur/2, mostConnections)), nil
}

// bounded is a listener that closes at once what comes when its connections are as
// many as they may be.
type bounded struct {
	net.Listener
	slots chan struct{} // one token for each connection
}

func newBounded(l net.Listener, most int) *bounded {
	return &bounded{Listener: l, slots: make(chan struct{}, most)}
}

// Accept implements net.Listener.
func (b *bounded) Accept() (net.Conn, error) {
	for {
		conn, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case b.slots <- struct{}{}:
			return &counted{Conn: conn, leave: sync.OnceFunc(func() { <-b.slots })}, nil
		default:
			_ = conn.Close() // its client sees that, and nobody else is interested
		}
	}
}

// counted is a connection that gives its slot back when it is closed.
type counted struct {
	net.Conn
	leave func()
}

func (c *counted) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
