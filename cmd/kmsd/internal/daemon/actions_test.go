package daemon_test

import (
	"slices"
	"testing"

	"kmsd/cmd/kmsd/internal/auth"
	"kmsd/cmd/kmsd/internal/httpapi"
)

// A route with an action that no policy can name would be closed to all but local
// users, and an action without a route would promise something that is not there.
func TestPoliciesKnowTheActionsOfTheRoutes(t *testing.T) {
	routes, policies := httpapi.Actions(), auth.Actions()
	slices.Sort(routes)
	slices.Sort(policies)
	if !slices.Equal(routes, policies) {
		t.Errorf("routes ask for %v\npolicies can allow %v", routes, policies)
	}
}
