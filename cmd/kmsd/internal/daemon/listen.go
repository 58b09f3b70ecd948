package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kmsd/cmd/kmsd/internal/config"
)

// door is one address that is served.
type door struct {
	network  string // tcp or unix
	addr     string // as an operator writes it, with the port that was found for port 0
	listener net.Listener
}

type doors []door

// listen opens every address, using what is open already. On an error it closes
// all of them.
func listen(addrs []string, open map[string]net.Listener) (_ doors, err error) {
	var ds doors
	defer func() {
		if err != nil {
			err = errors.Join(err, ds.close(), closeAll(open))
		}
	}()
	for _, addr := range addrs {
		network, address, err := config.ParseListen(addr)
		if err != nil {
			return ds, err
		}
		l, ok := open[addr]
		if !ok {
			if l, err = bind(network, address); err != nil {
				return ds, fmt.Errorf("listening on %s: %w", addr, err)
			}
		}
		if network == "tcp" {
			addr = "https://" + l.Addr().String()
		}
		ds = append(ds, door{network, addr, l})
	}
	return ds, nil
}

func bind(network, address string) (net.Listener, error) {
	if network != "unix" {
		l, err := net.Listen(network, address)
		if errors.Is(err, syscall.EADDRINUSE) {
			return nil, errServed
		}
		return l, err
	}
	if err := removeStale(address); err != nil {
		return nil, err
	}
	// The mask is the process's; while kmsd starts nothing else makes files, and if
	// it did they would only be closed to others.
	mask := unix.Umask(0o177)
	defer unix.Umask(mask)
	return net.Listen(network, address)
}

var errServed = errors.New("another process serves it; use that kmsd, stop it, or choose another address")

// removeStale removes a socket that nobody serves, which a kmsd that was killed has
// left behind. What is no socket is never touched.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != fs.ModeSocket:
		return errors.New("there is a file of that name that is not a socket")
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		return errors.Join(errServed, conn.Close())
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}

func (ds doors) addrs() []string {
	var addrs []string
	for _, d := range ds {
		addrs = append(addrs, d.addr)
	}
	return addrs
}

func (ds doors) tcp() bool {
	return slices.ContainsFunc(ds, func(d door) bool { return d.network == "tcp" })
}

// close closes every listener. Those that a server has closed already are no error.
func (ds doors) close() error {
	var errs []error
	for _, d := range ds {
		if err := d.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, fmt.Errorf("closing %s: %w", d.addr, err))
		}
	}
	return errors.Join(errs...)
}

func closeAll(ls map[string]net.Listener) error {
	var errs []error
	for _, l := range ls {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
