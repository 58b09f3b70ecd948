package kms_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// disguised is a driver whose token says something else of itself.
type disguised struct {
	pluginproto.Driver
	change func(*pluginproto.TokenInfo)
}

func (d *disguised) Open(ctx context.Context, req pluginproto.OpenRequest) (pluginproto.TokenInfo, error) {
	info, err := d.Driver.Open(ctx, req)
	d.change(&info)
	return info, err
}

func TestTheJoinCheckNamesTheDifference(t *testing.T) {
	for _, c := range []struct {
		name    string
		change  func(*pluginproto.TokenInfo)
		refused string // "" means that it joins
		warning string
	}{
		{"another kind of driver is refused", func(i *pluginproto.TokenInfo) { i.Driver = "luna 10.9" }, `its driver is "luna 10.9" and that of member hsm-a is "memory 1.0"`, ""},
		{"another domain secret is refused", func(i *pluginproto.TokenInfo) { i.DomainCheck = []byte("other") }, "both need the same one", ""},
		{"the token of another member is refused", func(i *pluginproto.TokenInfo) { i.Label, i.Serial = "hsm-b", "mem-hsm-b" }, "is that of member hsm-b", ""},
		{"a token without a mechanism that others offer is refused", func(i *pluginproto.TokenInfo) { i.Mechanisms = []pluginproto.Mechanism{pluginproto.AESGCM} }, "it does not offer RSA PKCS #1 v1.5, RSA PSS, RSA OAEP, ECDSA, HMAC as member hsm-a does", ""},
		{"a token that does not say what it offers is taken", func(i *pluginproto.TokenInfo) { i.Mechanisms, i.Model = nil, "memory 3" }, "", "its model is memory 3"},
		{"another firmware is a warning, for upgrades go member by member", func(i *pluginproto.TokenInfo) { i.Firmware = "1.1" }, "", "its firmware is 1.1, that of member hsm-a is 1.0"},
		{"another version of the driver is a warning", func(i *pluginproto.TokenInfo) { i.Driver = "memory 1.1" }, "", "its driver is memory 1.1"},
		{"a token that has no protocol in common is refused", func(i *pluginproto.TokenInfo) { i.Cloning[0].Name = "cpv4" },
			"hsm-a gives keys away by memory, hsm-x takes them by cpv4; and cloning keys from member hsm-x to member hsm-a: they have no cloning protocol in common: hsm-x gives keys away by cpv4, hsm-a takes them by memory", ""},
		{"a token that can give keys and not take them is refused", func(i *pluginproto.TokenInfo) { i.Cloning[0].Takes = false },
			"no member can give it keys: cloning keys from member hsm-a to member hsm-x", ""},
		{"a token that can take keys and not give them is a warning", func(i *pluginproto.TokenInfo) { i.Cloning[0].Gives = false },
			"", "keys are cloned from member hsm-a to member hsm-x and not back"},
		{"another model is a warning", func(i *pluginproto.TokenInfo) { i.Model = "memory 2" }, "", "its model is memory 2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newReserve(t, 2, "hsm-x")
				plain := r.enlist
				r.enlist = func(group string, spec api.MemberSpec) (kms.MemberConfig, error) {
					m, err := plain(group, spec)
					open := m.Open
					m.Open = func(ctx context.Context) (pluginproto.Driver, error) {
						d, err := open(ctx)
						return &disguised{d, c.change}, err
					}
					return m, err
				}
				r.mustStart()
				defer func() { r.stop() }()
				r.create("shop")
				_, err := r.AddMember(t.Context(), "", r.spec("hsm-x", "hsm-x"))
				if c.refused != "" {
					wantError(t, err, api.ErrMemberFailed, c.refused)
					r.wantMembers("hsm-a hsm-b")
					if n := len(r.spare["hsm-x"].token.Keys()); n > 0 {
						t.Errorf("%d keys were left on it", n)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				events, err := r.Log(t.Context(), 0)
				if err != nil {
					t.Fatal(err)
				}
				var causes []string
				for _, e := range events {
					causes = append(causes, e.Cause)
				}
				if !strings.Contains(strings.Join(causes, "\n"), "warning: "+c.warning) {
					t.Errorf("no event says %q", c.warning)
				}
			})
		})
	}
}

func TestAGroupHasAtMost32Members(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 31, "hsm-x1", "hsm-x2")
		r.mustStart()
		defer func() { r.stop() }()
		r.add("hsm-x1")
		_, err := r.AddMember(t.Context(), "", r.spec("hsm-x2", "hsm-x2"))
		wantError(t, err, api.ErrState, "has 32 members, which is the most")
	})
}

// A domain secret that was exchanged under the members is found out by each of them.
func TestATokenOfAnotherDomainIsFailedUntilItIsAccepted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 2)
		r.mustStart()
		defer func() { r.stop() }()
		r.create("shop")
		wrapped := r.wrap("shop")
		r.stop()
		good := r.group.Domain
		r.group.Domain = func(context.Context) ([]byte, error) { return []byte(strings.Repeat("x", 32)), nil }
		r.mustStart()
		r.wantMembers("hsm-a:failed hsm-b:failed")
		for _, m := range r.Status().Groups[0].Members {
			if want := fmt.Sprintf("kmsd member replace %s", m.Name); !strings.Contains(m.Reason, want) || !strings.Contains(m.Reason, "another domain secret") {
				t.Errorf("the reason of %s is %s", m.Name, m.Reason)
			}
		}
		r.stop()
		r.group.Domain = good
		r.mustStart()
		r.wantMembers("hsm-a hsm-b")
		r.wantUnwrap("shop", wrapped)
	})
}

// What the configuration trusts may change while kmsd is down.
func TestAnAddedMemberThatIsRefusedNowIsFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 2, "hsm-x")
		r.mustStart()
		defer func() { r.stop() }()
		r.create("shop")
		r.add("hsm-x")
		r.stop()
		plain := r.enlist
		r.enlist = func(string, api.MemberSpec) (kms.MemberConfig, error) {
			return kms.MemberConfig{}, errors.New("no member of the configuration uses this driver")
		}
		r.mustStart()
		r.wantMembers("hsm-a hsm-b hsm-x:failed")
		if m := r.Status().Groups[0].Members[2]; !strings.Contains(m.Reason, "no member of the configuration uses this driver") {
			t.Errorf("the reason is %s", m.Reason)
		}
		r.stop()
		r.enlist = plain
		r.mustStart()
		r.wantMembers("hsm-a hsm-b hsm-x")
		r.wantVerified("shop")
	})
}

// A driver that is exchanged under all members at once must not take the group down:
// they follow one after the other, and not behind one that does not come back.
func TestAReloadStopsAtTheFirstMemberThatDoesNotComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReserve(t, 3)
		r.mustStart()
		defer func() { r.stop() }()
		r.create("shop")
		stop := r.load("shop")
		defer stop()
		g := r.group
		g.Members = nil
		for _, m := range r.group.Members {
			m.Settings = map[string]string{"module": "/no/such/library"}
			g.Members = append(g.Members, m)
		}
		left, err := r.Reconfigure(t.Context(), []kms.GroupConfig{g})
		if err != nil || len(left) != 3 || !strings.Contains(left[0], "member hsm-a of group default: it did not come back with its new entry") ||
			!strings.Contains(left[1], "member hsm-b of group default: the one before it did not come back, so it was left as it is") {
			t.Errorf("left is %q, %v", left, err)
		}
		r.wantMembers("hsm-a:failed hsm-b hsm-c")
		left, err = r.Reconfigure(t.Context(), []kms.GroupConfig{r.group})
		if err != nil || len(left) != 0 {
			t.Errorf("left is %q, %v", left, err)
		}
		r.wantMembers("hsm-a hsm-b hsm-c")
	})
}

// The members of a new group come at once, and none of them is there yet to be compared with.
func TestMembersThatComeAtOnceAreComparedToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 2)
		for i, kind := range []string{"luna 1", "softhsm 1"} {
			// So that both are looked at before the first is in.
			r.hsms[i].faults = []memdriver.Fault{{Call: memdriver.CallList, Times: 1, Delay: time.Second}}
			plain := r.group.Members[i].Open
			r.group.Members[i].Open = func(ctx context.Context) (pluginproto.Driver, error) {
				d, err := plain(ctx)
				return &disguised{d, func(info *pluginproto.TokenInfo) { info.Driver = kind }}, err
			}
		}
		r.mustStart()
		defer r.stop()
		<-time.After(3 * time.Second)
		states := map[api.MemberState]int{}
		for _, m := range r.Status().Groups[0].Members {
			states[m.State]++
			if m.State == api.MemberFailed && !strings.Contains(m.Reason, "keys cannot be cloned between them") {
				t.Errorf("the reason is %s", m.Reason)
			}
		}
		if states[api.MemberActive] != 1 || states[api.MemberFailed] != 1 {
			t.Errorf("the members are %v; want that one is in and the other is refused", states)
		}
	})
}
