package scheduler_test

import (
	"testing"

	"kmsd/kms/internal/group/scheduler"
)

func TestPick(t *testing.T) {
	const away = scheduler.Away
	for _, c := range []struct {
		name  string
		loads []int
		from  int
		want  int
	}{
		{"the least busy member is chosen wherever the round stands", []int{3, 1, 2}, 2, 1},
		{"among equals the round decides", []int{0, 0, 0}, 1, 1},
		{"the round goes on after the last member", []int{0, 2, 2}, 1, 0},
		{"a member that is away is passed over although it is idle", []int{away, 5, 4}, 0, 2},
		{"a heavy command weighs as much as many light ones", []int{16, 15, 17}, 0, 1},
		{"the only member serves", []int{7}, 0, 0},
		{"nobody is chosen when all are away", []int{away, away}, 1, -1},
		{"nobody is chosen in an empty group", nil, 0, -1},
		{"a round that points past the end begins anew", []int{0, 0}, 5, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := scheduler.Pick(c.loads, c.from); got != c.want {
				t.Errorf("Pick(%v, %d) = %d, want %d", c.loads, c.from, got, c.want)
			}
		})
	}
}

func TestEqualMembersGetEqualShares(t *testing.T) {
	loads := make([]int, 5)
	from := 0
	for range 1000 {
		at := scheduler.Pick(loads, from)
		loads[at]++
		from = (at + 1) % len(loads)
	}
	for i, n := range loads {
		if n != 200 {
			t.Errorf("member %d has %d of 1000 commands, want 200", i, n)
		}
	}
}
