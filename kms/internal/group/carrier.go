package group

// idleCarriers is how many goroutines are kept for the next commands.
const idleCarriers = 128

// job is an attempt to be carried to its member.
type job struct {
	d *dispatch
	a *attempt
}

// give hands a job to an idle carrier or to a new one. Carriers are kept because
// their stacks have grown to what a call of a driver needs, which a new goroutine
// would have to do again for each command.
func (g *Group) give(j job) {
	select {
	case g.jobs <- j:
	default:
		g.tasks.Go(func() { g.carryAll(j) })
	}
}

func (g *Group) carryAll(j job) {
	for {
		j.d.carry(j.a)
		j = job{} // let go of what it holds
		if g.idle.Add(1) > idleCarriers {
			g.idle.Add(-1)
			return
		}
		select {
		case j = <-g.jobs:
			g.idle.Add(-1)
		case <-g.ctx.Done():
			return
		}
	}
}
