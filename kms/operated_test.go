package kms_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/api/apitest"
)

// shelf has HSMs that can join a group, each made when it is first asked for.
type shelf struct {
	mu   sync.Mutex // guards hsms
	hsms map[string]*hsm
}

// enlist takes any member that is well described.
func (s *shelf) enlist(_ string, spec api.MemberSpec) (kms.MemberConfig, error) {
	if spec.Driver == "" || spec.PIN.File == "" {
		return kms.MemberConfig{}, errors.New("member " + spec.Name + " has no driver or no PIN")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.hsms[spec.Name]
	if h == nil {
		h = &hsm{name: spec.Name, token: memdriver.NewToken(spec.Name), pin: memdriver.PIN}
		s.hsms[spec.Name] = h
	}
	return kms.MemberConfig{
		Name: spec.Name, Driver: spec.Driver, Standby: spec.Standby, Open: h.open,
		PIN: func(context.Context) ([]byte, error) { return []byte(memdriver.PIN), nil },
	}, nil
}

// What an operator does keeps its promises over real groups as it does over HTTP.
func TestOperatorsKeepTheirPromises(t *testing.T) {
	apitest.RunAdmin(t, synctest.Test, func(t *testing.T) (apitest.Operated, func(string) api.MemberSpec) {
		r := newRig(t, 3)
		s := shelf{hsms: make(map[string]*hsm)}
		k, err := kms.Open(t.Context(), kms.Config{
			Catalog: r.disk.Reopen(), Groups: []kms.GroupConfig{r.group}, Enlist: s.enlist,
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := k.Close(); err != nil {
				t.Error(err)
			}
		})
		return k, apitest.MemorySpare
	})
}

// A member is taken out for work on its HSM, and brought back.
func ExampleKMS_Drain() {
	ctx := context.Background()
	k, err := kms.Open(ctx, exampleConfig())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer k.Close()
	m, err := k.Drain(ctx, "default", "hsm-b", false)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(m.Name, "is", m.State, "with", m.InFlight, "commands in flight")
	if m, err = k.SetRole(ctx, "default", "hsm-b", api.RoleActive, false); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(m.Name, "is", m.State)
	// Output:
	// hsm-b is draining with 0 commands in flight
	// hsm-b is active
}
