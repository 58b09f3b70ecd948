package kms

import (
	"fmt"

	"kmsd/kms/api"
	"kmsd/kms/internal/group"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

// While a group is upgraded member by member, keys may go from one to another and not back:
// a new firmware takes from an old one what it no longer gives to it.

// takesFromSome refuses a token that no member in step can give keys to: it would never hold
// what it should. That it cannot give keys to the others is no reason to do without it.
func takesFromSome(m group.Member, others []group.Member) error {
	for _, other := range others {
		if replica.Together(other, m) > 0 {
			return nil
		}
	}
	if len(others) == 0 {
		return nil
	}
	return ownFault(pluginproto.CKROK, "joining the group with member "+m.Name(), "no member can give it keys: %v",
		replica.NoCommonProtocol(others[0], m))
}

// oneWay says that keys go from one member to another, and not back; "" when they do both.
func oneWay(a, b group.Member) string {
	switch there, back := replica.Together(a, b), replica.Together(b, a); {
	case there > 0 && back == 0:
		return oneWayFrom(a, b)
	case there == 0 && back > 0:
		return oneWayFrom(b, a)
	default:
		return ""
	}
}

func oneWayFrom(from, to group.Member) string {
	return fmt.Sprintf("keys are cloned from member %s to member %s and not back, so what only %s holds cannot be copied to %s (%v)",
		from.Name(), to.Name(), to.Name(), from.Name(), replica.NoCommonProtocol(to, from))
}

// givesToMost reports whether no other member can give keys to more of them. Whoever makes a
// key has to bring it to the others.
func givesToMost(m group.Member, members []group.Member) bool {
	mine := reach(m, members)
	for _, other := range members {
		if reach(other, members) > mine {
			return false
		}
	}
	return true
}

// reach is how many members a member can give keys to.
func reach(from group.Member, members []group.Member) (n int) {
	for _, to := range members {
		if to.Name() != from.Name() && replica.Together(from, to) > 0 {
			n++
		}
	}
	return n
}

// giverBefore returns the nearest member before one, in a circle, that can give keys to it;
// nil when none can.
func giverBefore(members []group.Member, at int) group.Member {
	n := len(members)
	for i := 1; i < n; i++ {
		if before := members[(at+n-i)%n]; replica.Together(before, members[at]) > 0 {
			return before
		}
	}
	return nil
}

// protocolFindings says who cannot give keys to whom.
func protocolFindings(members []group.Member) (all []api.Finding) {
	for _, to := range members {
		var not []group.Member
		for _, from := range members {
			if from.Name() != to.Name() && replica.Together(from, to) == 0 {
				not = append(not, from)
			}
		}
		if len(not) > 0 && len(not) == len(members)-1 {
			all = append(all, faultOf(to.Name(), "no member can give it keys, so it will not hold what is made from now on: %v", replica.NoCommonProtocol(not[0], to)))
			continue
		}
		for _, from := range not {
			all = append(all, warningOf(to.Name(), "cannot be given keys by member %s, so what only that one holds does not reach it: %v", from.Name(), replica.NoCommonProtocol(from, to)))
		}
	}
	return all
}
