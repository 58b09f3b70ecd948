package main

import (
	"testing"

	"kmsd/internal/drivertest"
	"kmsd/pluginproto"
	"kmsd/plugins/luna/lunasim"
)

// The whole contract, across the process wall, for partitions that have each protocol.
func TestContract(t *testing.T) {
	kinds := []struct {
		name    string
		options lunasim.Options
	}{
		{"firmware 7.4.0, CPv1", lunasim.Options{Firmware: "7.4.0"}},
		{"firmware 7.8.0 held to CPv1", lunasim.Options{Firmware: "7.8.0", Policies: map[int]int{policyCPv1: 1}}},
		{"firmware 7.7.1, CPv3", lunasim.Options{Firmware: "7.7.1"}},
		{"firmware 7.8.0, CPv4 and CPv3", lunasim.Options{Firmware: "7.8.0"}},
		{"firmware 7.8.0 in FIPS mode, which makes its IVs itself", lunasim.Options{HSMPolicies: map[int]int{hsmNonFIPS: 0}}},
		{"SIM", lunasim.Options{Kind: "sim"}},
	}
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			drivertest.Run(t, drivertest.Config{
				NewToken: func(t *testing.T) drivertest.Token { return token(lunasim.New(t, kind.options)) },
				Types: []pluginproto.KeyType{
					pluginproto.AES256, pluginproto.AES128, pluginproto.RSA2048, pluginproto.ECP256, pluginproto.HMACSHA256,
				},
			})
		})
	}
}

// token is a partition as the suite wants it, each driver in a process of its own.
func token(p *lunasim.Partition) drivertest.Token {
	return drivertest.Token{
		Start:    func(t *testing.T) pluginproto.Driver { return process(t, nil) },
		Settings: p.Settings(),
		PIN:      []byte(p.PIN),
	}
}
