// Package leaktest answers: does a package leave goroutines behind when its tests are done,
// on a machine of any speed?
package leaktest

import (
	"testing"

	"go.uber.org/goleak"
)

// tries is how often goroutines that are still there are looked for. goleak itself waits 0.4 s
// for those that are just ending, which is less than a busy machine may stop one of them.
const tries = 60

// Main runs the tests of a package, and fails when goroutines are there after that and do not
// end. To be called from TestMain. It ends the process; options are goleak's.
func Main(m *testing.M, options ...goleak.Option) {
	goleak.VerifyTestMain(patient{m}, options...)
}

// patient is done when the tests are, and nothing of them runs any more or it has run for long.
type patient struct{ tests goleak.TestingM }

func (p patient) Run() int {
	code := p.tests.Run()
	for range tries {
		if goleak.Find() == nil {
			break
		}
	}
	return code
}
