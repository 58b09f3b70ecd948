package main

import (
	"testing"

	"kmsd/plugins/luna/lunasim"
)

// ways are partitions that have each protocol as their best.
var ways = []struct {
	protocol string
	options  lunasim.Options
}{
	{cpv1, lunasim.Options{Firmware: "7.4.0"}},
	{cpv1New, lunasim.Options{Firmware: "7.8.0", Policies: map[int]int{policyCPv1: 1}}},
	{cpv3, lunasim.Options{Firmware: "7.7.1"}},
	{cpv4, lunasim.Options{Firmware: "7.8.0"}},
	{sim, lunasim.Options{Kind: "sim"}},
}

func TestEachProtocolCarriesKeys(t *testing.T) {
	for _, way := range ways {
		t.Run(way.protocol, func(t *testing.T) {
			from, to := openEnd(t, way.options), openEnd(t, way.options)
			if best := from.info.Cloning[0].Name; best != way.protocol {
				t.Errorf("the best protocol is %s", best)
			}
			secret, private := from.aes(t, "secret"), from.ec(t, "private")
			x := transfer{protocol: way.protocol}
			received, err := x.run(t, from, to, secret)
			arrives(t, to, received, err, "secret")
			received, err = x.run(t, from, to, private)
			arrives(t, to, received, err, "private")
		})
	}
}
