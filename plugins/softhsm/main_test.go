package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"kmsd/internal/drivertest"
	"kmsd/internal/softhsmtest"
	"kmsd/pluginproto"
)

func TestMain(m *testing.M) { drivertest.Main(m, run) }

// process starts a driver process that ends with the test.
func process(t *testing.T) pluginproto.Driver {
	t.Helper()
	return drivertest.Process(t, nil)
}

// The whole contract, across the process wall, one token and one store a process.
func TestContract(t *testing.T) {
	tokens := 0
	drivertest.Run(t, drivertest.Config{
		NewToken: func(t *testing.T) drivertest.Token {
			tokens++
			label := fmt.Sprintf("token-%d", tokens)
			conf, pin := softhsmtest.NewToken(t, label)
			return drivertest.Token{
				Start:    process,
				Settings: map[string]string{"token_label": label, "softhsm_conf": conf},
				PIN:      []byte(pin),
			}
		},
		// Those that take long to make are tested in the engine's own package.
		Types: []pluginproto.KeyType{
			pluginproto.AES256, pluginproto.AES128, pluginproto.RSA2048, pluginproto.ECP256, pluginproto.HMACSHA256,
		},
	})
}

func TestInitToken(t *testing.T) {
	store := softhsmtest.NewStore(t)
	good := map[string]string{"softhsm_conf": store.Conf, "label": "shop", "pin": "1234-user", "so_pin": "5678-officer"}
	out, errs, code := initToken(t, good)
	if code != 0 || errs != "" {
		t.Fatalf("code %d: %s", code, errs)
	}
	var made struct {
		Serial string
		Slot   *uint
	}
	if err := json.Unmarshal([]byte(out), &made); err != nil || made.Serial == "" || made.Slot == nil {
		t.Fatalf("answered %q: %v", out, err)
	}

	d := process(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	info, err := d.Open(ctx, pluginproto.OpenRequest{
		Settings: map[string]string{"token_serial": made.Serial, "softhsm_conf": store.Conf},
		PIN:      []byte(good["pin"]), Domain: make([]byte, 32),
	})
	if err != nil || info.Label != "shop" || info.Driver != "softhsm dev" {
		t.Errorf("opening the new token: %+v, %v", info, err)
	}

	for _, tc := range []struct {
		name   string
		change map[string]string
		want   string
	}{
		{"a label that is taken", nil, "there is a token with this label already"},
		{"an empty PIN", map[string]string{"pin": ""}, "pin is empty"},
		{"an unknown member", map[string]string{"slot": "1"}, `unknown member "slot"`},
		{"a configuration that is not there", map[string]string{"softhsm_conf": "/nowhere"}, "softhsm_conf: stat /nowhere"},
		{"a PIN that is too short", map[string]string{"label": "new", "pin": "1"}, "CKR_PIN_LEN_RANGE"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			request := maps.Clone(good)
			maps.Copy(request, tc.change)
			_, errs, code := initToken(t, request)
			if code != 1 || !strings.Contains(errs, tc.want) {
				t.Errorf("code %d: %s, want %q", code, errs, tc.want)
			}
			if strings.Contains(errs, good["so_pin"]) {
				t.Error("the message tells a PIN")
			}
		})
	}
	t.Run("no JSON", func(t *testing.T) {
		_, errs, code := drivertest.Command(t, []byte(`{"pin": 1234-user`), "init-token")
		if code != 1 || !strings.Contains(errs, "not one JSON object") || strings.Contains(errs, "1234") {
			t.Errorf("code %d: %s", code, errs)
		}
	})
}

func initToken(t *testing.T, request map[string]string) (out, errs string, code int) {
	t.Helper()
	raw, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	return drivertest.Command(t, raw, "init-token")
}

// SoftHSM writes the file of a token at each login, a failed one too, and reads those
// of all tokens when it is loaded.
func TestDriversOpenTokensOfOneDirectoryAtTheSameTime(t *testing.T) {
	const tokens, drivers, rounds = 2, 6, 2
	store := softhsmtest.NewStore(t)
	for n := range tokens {
		store.Add(t, fmt.Sprintf("token-%d", n))
	}
	for round := range rounds {
		t.Run(fmt.Sprintf("round %d", round), func(t *testing.T) {
			var opening sync.WaitGroup
			for n := range drivers {
				d, pin, want := process(t), softhsmtest.PIN, uint(pluginproto.CKROK)
				if n < tokens {
					pin, want = "wrong-one", pluginproto.CKRPINIncorrect
				}
				opening.Go(func() {
					_, err := d.Open(t.Context(), pluginproto.OpenRequest{
						Settings: map[string]string{"token_label": fmt.Sprintf("token-%d", n%tokens), "softhsm_conf": store.Conf},
						PIN:      []byte(pin), Domain: make([]byte, 32),
					})
					if pluginproto.CKROf(err) != want || (err == nil) != (n >= tokens) {
						t.Errorf("driver %d: %v", n, err)
					}
				})
			}
			opening.Wait()
		})
	}
}

func TestCommandLine(t *testing.T) {
	out, _, code := drivertest.Command(t, nil, "--version")
	if code != 0 || out != "kmsd-driver-softhsm dev\n" {
		t.Errorf("--version: code %d, %q", code, out)
	}
	for _, args := range [][]string{nil, {"--help"}, {"init-token", "--pin", "1234"}} {
		out, errs, code := drivertest.Command(t, nil, args...)
		if code != 2 || out != "" || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "started by kmsd") {
			t.Errorf("%v: code %d, %q, %q", args, code, out, errs)
		}
	}
}
