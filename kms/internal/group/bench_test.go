package group_test

import (
	"context"
	"testing"
	"time"

	"kmsd/kms/internal/group"
)

// BenchmarkDo is what the group itself costs: its members answer in no time.
func BenchmarkDo(b *testing.B) {
	for _, c := range []struct {
		name  string
		hedge bool
	}{{"plain", false}, {"hedged", true}} {
		b.Run(c.name, func(b *testing.B) {
			r := newRig(b, three, func(cfg *group.Config) { cfg.Hedge = c.hedge })
			if err := r.Start(b.Context()); err != nil {
				b.Fatal(err)
			}
			defer r.Close()
			ctx, cancel := context.WithTimeout(b.Context(), time.Hour)
			defer cancel()
			b.ReportAllocs()
			for b.Loop() {
				if _, err := r.Do(ctx, encrypt); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
