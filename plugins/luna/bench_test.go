package main

import (
	"crypto/rand"
	"testing"

	"kmsd/pluginproto"
	"kmsd/plugins/luna/lunasim"
)

// BenchmarkClone tells how many steps of drivers it takes to move keys to an empty partition,
// and how long, by each protocol that firmware 7.8.0 has. Only the steps say something of a
// real HSM, each of which is a round trip to it.
func BenchmarkClone(b *testing.B) {
	const keys = 200
	domain := newDomain()
	from := openDriver(b, lunasim.New(b, lunasim.Options{}), domain, nil)
	ids := make([]pluginproto.KeyID, keys)
	for i := range ids {
		_, _ = rand.Read(ids[i][:]) // never fails
		if _, err := from.Generate(b.Context(), pluginproto.KeySpec{ID: ids[i], Type: pluginproto.AES256}); err != nil {
			b.Fatal(err)
		}
	}
	for _, protocol := range []string{cpv4, cpv3} {
		b.Run(protocol, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				to := openDriver(b, lunasim.New(b, lunasim.Options{}), domain, nil)
				way, ok := pluginproto.CommonProtocol(pick(from.info.Cloning, protocol), to.info.Cloning)
				if !ok {
					b.Fatalf("there is no %s", protocol)
				}
				b.StartTimer()
				steps := 0
				for rest := ids; len(rest) > 0; rest = rest[way.Keys:] {
					n, err := clone(b.Context(), from, to, protocol, rest[:way.Keys], unchanged)
					if err != nil {
						b.Fatal(err)
					}
					steps += n
				}
				b.ReportMetric(float64(steps), "steps/op")
			}
		})
	}
}

func pick(all []pluginproto.CloneProtocol, name string) []pluginproto.CloneProtocol {
	for _, p := range all {
		if p.Name == name {
			return []pluginproto.CloneProtocol{p}
		}
	}
	return nil
}
