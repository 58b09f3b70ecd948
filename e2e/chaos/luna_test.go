package chaos_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"kmsd/e2e/chaos"
	"kmsd/pluginproto"
	"kmsd/plugins/luna/lunasim"
)

// lunaToken is a partition.
type lunaToken struct {
	t         *testing.T
	options   lunasim.Options
	partition *lunasim.Partition
	conf      string // path of the Chrystoki.conf that the member is configured with
	armed     *lunasim.Armed
}

// partitions are what the members of a run can be, by its seed. They are not changed.
var partitions = [...]struct {
	name    string
	options lunasim.Options
}{
	{"CPv4", lunasim.Options{}},
	{"CPv3", lunasim.Options{Firmware: "7.7.1"}},
	{"CPv1", lunasim.Options{Firmware: "7.4.0"}},
	{"SIM", lunasim.Options{Kind: "sim"}},
	{"CPv4 in FIPS mode", lunasim.Options{HSMPolicies: map[int]int{12: 0}}},
}

// useLuna gives every member a partition, and the group an empty catalog. Their serials
// are not in the configuration, so that it can be another partition some day.
func (s *site) useLuna(seed uint64) {
	s.t.Helper()
	kind := partitions[(seed-fixedSeed)%uint64(len(partitions))]
	s.t.Logf("the partitions clone by %s", kind.name)
	for i, h := range s.hsms {
		options := kind.options
		options.Label = h.name
		p := lunasim.New(s.t, options)
		pin := filepath.Join(s.dir, h.name+".pin")
		if err := os.WriteFile(pin, []byte(p.PIN+"\n"), 0o600); err != nil {
			s.t.Fatal(err)
		}
		settings := map[string]any{"module": p.Module, "token_label": p.Label, "chrystoki_conf": p.Conf}
		s.entries()[i].(map[string]any)["settings"] = settings
		h.token = &lunaToken{t: s.t, options: options, partition: p, conf: p.Conf}
	}
}

func (k *lunaToken) arm(f fault) {
	does := map[what]lunasim.What{
		closeSessions: lunasim.CloseSessions, logout: lunasim.Logout, answer: lunasim.Answer, hang: lunasim.Hang,
		sleep: lunasim.Sleep, lose: lunasim.Lose,
	}
	k.armed = k.partition.Arm(lunasim.Fault{What: does[f.what], Function: f.function, After: uint32(f.after), Times: uint32(f.times), Arg: uint32(f.arg)})
}

func (k *lunaToken) disarm() {
	if k.armed != nil {
		k.armed.Disarm()
		k.armed = nil
	}
}

func (k *lunaToken) left() int { return k.armed.Left() }

// remove cuts the link to the partition: every other time a new driver does not find it in
// its slot, and cannot even initialise the library else.
func (k *lunaToken) remove(way int) (back func() error, err error) {
	calls := []string{"*", "C_OpenSession", "C_GetTokenInfo"}
	if way%2 == 0 {
		calls = append(calls, "C_Initialize")
	}
	var armed []*lunasim.Armed
	for _, function := range calls {
		armed = append(armed, k.partition.Arm(lunasim.Fault{
			What: lunasim.Answer, Function: function, Times: lunasim.Forever, Arg: uint32(pluginproto.CKRTokenNotPresent),
		}))
	}
	return func() error {
		for _, a := range armed {
			a.Disarm()
		}
		return nil
	}, nil
}

// replace has the library find another partition. Processes that have it open keep the old
// one.
func (k *lunaToken) replace(context.Context) (forget func(), err error) {
	p := lunasim.New(k.t, k.options)
	conf, err := os.ReadFile(p.Conf)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(k.conf+".new", conf, 0o600); err != nil {
		return nil, err
	}
	k.partition = p
	return func() {}, os.Rename(k.conf+".new", k.conf)
}

// fill leaves room for what the partition holds, and for nothing else.
func (k *lunaToken) fill() (free func() error, err error) {
	k.partition.Set("limit_objects", "1")
	return func() error {
		k.partition.Set("limit_objects", "0")
		return nil
	}, nil
}

// bytes are digests of the keys that the partition keeps, by identity.
func (k *lunaToken) bytes() map[string]string {
	kept := map[string]string{}
	for id, value := range k.partition.KeyBytes(k.t) {
		kept[id] = chaos.Digest(value)
	}
	return kept
}

// partition is that of a member of a run with Luna members.
func (s *site) partition(step chaos.Step) (*hsm, *lunasim.Partition) {
	h := s.hsms[step.Member]
	return h, h.token.(*lunaToken).partition
}

// deactivated lets nobody into a partition for a while, as when it waits for a person with
// a key after a power cut.
func deactivated(ctx context.Context, s *site, step chaos.Step) error {
	h, p := s.partition(step)
	codes := [...]string{"0x80000020", "0x101"} // CKR_PARTITION_DISABLED, CKR_USER_NOT_LOGGED_IN
	p.Set("deactivated_code", codes[step.After%len(codes)])
	p.Set("activated", "no")
	pause(ctx, step.Hold)
	p.Set("activated", "yes")
	_, err := s.whole(ctx, h, 0)
	return err
}

func powerCycled(ctx context.Context, s *site, step chaos.Step) error {
	h, p := s.partition(step)
	p.PowerCycle()
	pause(ctx, time.Second) // somebody needs the member meanwhile
	_, err := s.whole(ctx, h, 0)
	return err
}

// tampered ends a partition for good. Another one takes its place.
func tampered(ctx context.Context, s *site, step chaos.Step) error {
	h, p := s.partition(step)
	if _, err := s.whole(ctx, h, 0); err != nil {
		return err
	}
	p.Set("tampered", "yes")
	m, err := s.await(ctx, h, "failed", isFailed)
	if err == nil && m.CKR != "CKR_HSM_TAMPERED" {
		err = fmt.Errorf("%s is failed for %s, %s; want CKR_HSM_TAMPERED", h.name, m.CKR, m.Reason)
	}
	if err != nil {
		return err
	}
	pause(ctx, step.Hold)
	if err := s.recoverInVain(ctx, h); err != nil {
		return err
	}
	if _, err := h.token.replace(ctx); err != nil {
		return err
	}
	return s.accept(ctx, h)
}

// keyFault has the library misbehave while keys are made and destroyed.
func keyFault(what what, answer uint) func(context.Context, *site, chaos.Step) error {
	return func(ctx context.Context, s *site, step chaos.Step) error {
		h := s.hsms[step.Member]
		arg := answer
		if what == sleep {
			arg = uint(step.Hold / time.Millisecond)
		}
		h.token.arm(fault{what: what, function: step.Function, after: step.After, times: step.Times, arg: arg})
		healed := s.load.burst(ctx, min(step.Hold, firing))
		h.token.disarm()
		healed()
		_, err := s.whole(ctx, h, 0)
		return err
	}
}
