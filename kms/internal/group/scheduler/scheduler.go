// Package scheduler answers: who is least busy? It is one pure function.
package scheduler

// Away is the load of a member that may not be chosen.
const Away = -1

// Pick returns the index of the least loaded member, and among equals the first
// one at or after from, going round; -1 when all are away. A load is the cost of
// what a member has in flight; anything negative means away.
func Pick(loads []int, from int) int {
	best := -1
	for i := range loads {
		at := (from + i) % len(loads)
		if loads[at] < 0 {
			continue
		}
		if best < 0 || loads[at] < loads[best] {
			best = at
		}
	}
	return best
}
