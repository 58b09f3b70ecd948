package client_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"kmsd/kms/api"
	"kmsd/kms/client"
)

// A server cannot put a reader of events to sleep for years.
func TestAServerCannotAskForAnEternity(t *testing.T) {
	for _, ms := range []int64{1 << 40, 1<<63 - 1, -1 << 63} {
		if got := client.Delay(1, time.Hour, &api.Error{RetryAfterMS: ms}); got <= 0 || got > time.Minute {
			t.Errorf("after retry_after_ms %d the pause is %v", ms, got)
		}
	}
}

// The token goes to the server that it was given for and to no other.
func TestRedirectsAreNotFollowed(t *testing.T) {
	var stolen string
	_, thief := serve(t, nil, func(_ http.ResponseWriter, r *http.Request) { stolen = r.Header.Get("Authorization") + r.URL.Path })
	for _, status := range []int{301, 302, 303, 307, 308} {
		c, _ := serve(t, nil, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, thief.URL+"/thief", status) })
		if _, err := c.Wrap(t.Context(), "shop", []byte("secret"), nil); err == nil || !strings.Contains(err.Error(), fmt.Sprint(status)) {
			t.Errorf("a redirect with %d: %v", status, err)
		}
	}
	if stolen != "" {
		t.Errorf("another server has seen %q", stolen)
	}
}

// A token that cannot be one is refused before it gets anywhere, and not repeated.
func TestTokensThatCannotBe(t *testing.T) {
	for _, token := range []string{"two words", "kmsd_a\nX-Evil: 1", "kmsd_\x00", "kmsd_é", strings.Repeat("a", 5000)} {
		_, err := client.New("https://kms.example", client.Options{Token: token})
		if err == nil || strings.Contains(err.Error(), token) || !strings.Contains(err.Error(), "the token") {
			t.Errorf("%.20q: %v", token, err)
		}
	}
	_, err := client.Settings{Addr: "https://kms.example", Token: "kmsd_from-a-file\n"}.New()
	if err != nil {
		t.Errorf("the end of a line belongs to no token: %v", err)
	}
}
