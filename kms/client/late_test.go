package client_test

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"testing"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/client"
)

// A call returns when its context ends, wherever a server leaves it hanging. Whatever
// net/http waits for by itself is 5 s and more, so that a fault of the client is seconds
// and each time; a busy machine is late now and then, which is tried again, and with who
// does nothing but wait for the context too.
func TestNoCallOutlivesItsContext(t *testing.T) {
	const grace = 50 * time.Millisecond
	small, large := make([]byte, 32), make([]byte, 1<<20) // bytes; no socket takes the large one unread
	for _, tt := range []struct {
		name  string
		at    func(t *testing.T) *client.Client
		plain []byte
	}{
		{"nobody takes the connection", fullListener, small},
		{"no TLS handshake", func(t *testing.T) *client.Client { return silent(t, 0) }, small},
		{"a TLS handshake that ends in the middle", func(t *testing.T) *client.Client { return silent(t, 5) }, small},
		{"a large request is not read", hanging(func(http.ResponseWriter) {}), large},
		{"no answer", hanging(func(http.ResponseWriter) {}), small},
		{"headers and no body", hanging(func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "100")
			flush(w)
		}), small},
		{"half of a body", hanging(func(w http.ResponseWriter) {
			io.WriteString(w, `{"wrapped":"AAAA`)
			flush(w)
		}), small},
		{"a refusal every time", func(t *testing.T) *client.Client {
			c, _ := serve(t, eternal, func(w http.ResponseWriter, _ *http.Request) {
				fail(w, http.StatusServiceUnavailable, api.CodeUnavailable, true)
			})
			return c
		}, small},
		{"an end of the connection every time", func(t *testing.T) *client.Client {
			c, _ := serve(t, eternal, func(w http.ResponseWriter, _ *http.Request) { hangUp(t, w) })
			return c
		}, small},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := tt.at(t)
			deadline := 100*time.Millisecond + 10*encoding(t, tt.plain)
			const tries = 10
			var late, bare time.Duration
			for range tries {
				ctx, cancel := context.WithTimeout(t.Context(), deadline)
				woken := make(chan time.Time, 1)
				go func() { <-ctx.Done(); woken <- time.Now() }()
				due, _ := ctx.Deadline()
				_, err := c.Wrap(ctx, "shop", tt.plain, nil)
				late = time.Since(due)
				cancel()
				bare = (<-woken).Sub(due)
				if e := api.AsError(err); e.Code != api.CodeDeadline && e.Code != api.CodeUnavailable {
					t.Fatalf("got %v, want deadline or unavailable", err)
				}
				if late <= grace+4*max(0, bare) {
					return
				}
			}
			t.Errorf("the call returned %v after its deadline, who only waited for that %v, the last of %d times", late, bare, tries)
		})
	}
}

// encoding returns how long this machine takes to encode a plaintext, which no context
// ends; the race detector makes it many times as long.
func encoding(t *testing.T, plain []byte) time.Duration {
	t.Helper()
	begin := time.Now()
	if _, err := json.Marshal(map[string][]byte{"plaintext": plain}); err != nil {
		t.Fatal(err)
	}
	return time.Since(begin)
}

// The later a call is tried again the longer it pauses, but never for the rest of its time.
func TestAPauseLeavesTimeForAnotherAttempt(t *testing.T) {
	for attempt := 1; attempt < 20; attempt++ {
		for _, left := range []time.Duration{51 * time.Millisecond, 500 * time.Millisecond, 2 * time.Second, time.Hour} {
			if d := client.Delay(attempt, left, &api.Error{}); d <= 0 || d > left/2 || d > 2*time.Second {
				t.Errorf("attempt %d with %v left: a pause of %v", attempt, left, d)
			}
		}
	}
	// What the server asks for is not cut short, and so not waited for.
	if d := client.Delay(1, time.Second, &api.Error{RetryAfterMS: 5000}); d != 5*time.Second {
		t.Errorf("a pause of %v where the server asks for 5 s", d)
	}
}

func eternal(o *client.Options) { o.Attempts = 1 << 20 }

// bound returns a socket that has an address of its own, where nobody listens, until the
// test ends.
func bound(t *testing.T) (fd int, addr string) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	at, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fd, (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: at.(*syscall.SockaddrInet4).Port}).String()
}

// fullListener listens where the kernel takes no more connections.
func fullListener(t *testing.T) *client.Client {
	t.Helper()
	fd, addr := bound(t)
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	for { // the backlog of 0 has room for one or two
		conn, err := net.DialTimeout("tcp", addr, 50*time.Millisecond)
		if err != nil {
			break
		}
		t.Cleanup(func() { conn.Close() })
	}
	return to(t, addr)
}

// silent takes connections, reads so many bytes of each and says nothing.
func silent(t *testing.T, reads int) *client.Client {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			wg.Go(func() { io.ReadFull(conn, make([]byte, reads)) })
		}
	})
	return to(t, l.Addr().String())
}

func to(t *testing.T, addr string) *client.Client {
	t.Helper()
	c, err := client.New("https://"+addr, client.Options{RootCAs: x509.NewCertPool(), Token: "the-token"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// hanging does something for each request and then nothing more until the test ends.
func hanging(f func(http.ResponseWriter)) func(*testing.T) *client.Client {
	return func(t *testing.T) *client.Client {
		over := make(chan struct{})
		c, _ := serve(t, nil, func(w http.ResponseWriter, _ *http.Request) { f(w); <-over })
		t.Cleanup(func() { close(over) })
		return c
	}
}

func flush(w http.ResponseWriter) { w.(http.Flusher).Flush() }
