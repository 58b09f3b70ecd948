package p11_test

import (
	"fmt"
	"maps"
	"testing"

	"kmsd/internal/drivertest"
	"kmsd/internal/softhsmtest"
	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
)

func TestContract(t *testing.T) {
	// SoftHSM learns of new tokens when it is initialised, so all are made before.
	var labels []string
	for i := range 8 {
		labels = append(labels, fmt.Sprintf("token-%d", i))
	}
	b := newBench(t, labels...)
	used := 0
	drivertest.Run(t, drivertest.Config{NewToken: func(t *testing.T) drivertest.Token {
		if used == len(labels) {
			t.Fatal("the suite wants more tokens")
		}
		settings := maps.Clone(b.settings)
		settings["token_label"] = labels[used]
		used++
		return drivertest.Token{
			Start:    func(*testing.T) pluginproto.Driver { return p11.New(quirks(), p11.Options{}) },
			Settings: settings,
			PIN:      []byte(softhsmtest.PIN),
		}
	}})
}
