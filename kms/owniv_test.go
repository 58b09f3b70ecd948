package kms_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/internal/envelope"
	"kmsd/pluginproto"
)

// tokenKinds are groups of tokens that treat the IV of an encryption in different ways.
var tokenKinds = []struct {
	name   string
	ownIVs []int // by index in the group
	sizes  []int // of the IVs that come of it
}{
	{"one of them chooses its IVs", []int{0, 16, 0}, []int{12, 16}},
	{"one chooses IVs of the common length", []int{0, 12, 0}, []int{12}},
	{"all choose their IVs", []int{16, 16, 16}, []int{16}},
	{"each is different", []int{0, 12, 16}, []int{12, 16}},
}

// newKinds makes a group of such tokens.
func newKinds(t testing.TB, ownIVs []int) *rig {
	r := newRig(t, len(ownIVs))
	for i, n := range ownIVs {
		r.hsms[i].ownIV = n
	}
	return r
}

func TestTokensThatChooseTheirIVs(t *testing.T) {
	const n = 60
	aad := []byte("aad")
	for _, c := range tokenKinds {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newKinds(t, c.ownIVs).mustStart()
				defer r.stop()
				r.create("shop")
				var wrapped [][]byte
				for i := range n {
					switch i % 3 {
					case 0:
						wrapped = append(wrapped, r.wrap("shop"))
					case 1:
						dk, err := r.DataKey(t.Context(), "shop", 32, aad)
						if err != nil {
							t.Fatal(err)
						}
						if got, err := r.Unwrap(t.Context(), "shop", dk.Wrapped, aad); err != nil || !bytes.Equal(got, dk.Plaintext) {
							t.Fatalf("a data key came back as %x, %v", got, err)
						}
					default:
						results, err := r.Batch(t.Context(), kms.OpWrap, "shop", slices.Repeat([]kms.Item{{Plaintext: plaintextOf("shop"), AAD: aad}}, 8))
						if err != nil {
							t.Fatal(err)
						}
						for _, res := range results {
							if res.Error != nil {
								t.Fatal(res.Error)
							}
							wrapped = append(wrapped, res.Wrapped)
						}
					}
				}
				wantIVs(t, wrapped, c.sizes)
				if _, err := r.Rotate(t.Context(), "shop"); err != nil {
					t.Fatal(err)
				}
				var again [][]byte
				for _, w := range wrapped {
					r.wantUnwrap("shop", w)
					moved, err := r.Rewrap(t.Context(), "shop", w, aad)
					if err != nil {
						t.Fatal(err)
					}
					r.wantUnwrap("shop", moved)
					again = append(again, moved)
				}
				wantIVs(t, again, c.sizes)
			})
		})
	}
}

// wantIVs says that no IV was used twice, and of which lengths they are.
func wantIVs(t *testing.T, wrapped [][]byte, sizes []int) {
	t.Helper()
	var found []int
	used := make(map[string]bool)
	for _, w := range wrapped {
		e, err := envelope.Parse(w)
		if err != nil {
			t.Fatal(err)
		}
		if used[string(e.IV)] {
			t.Fatalf("the IV %x was used twice", e.IV)
		}
		used[string(e.IV)] = true
		found = append(found, len(e.IV))
	}
	slices.Sort(found)
	if found = slices.Compact(found); !slices.Equal(found, sizes) {
		t.Errorf("there are IVs of %v bytes, want %v", found, sizes)
	}
}

// What one kind of token has wrapped, each other kind unwraps.
func TestEnvelopesOfEveryKindOfTokenUnwrapOnTheOthers(t *testing.T) {
	ownIVs := []int{0, 12, 16}
	for from := range ownIVs {
		for to := range ownIVs {
			t.Run(fmt.Sprintf("from IVs of %d to %d", ownIVs[from], ownIVs[to]), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := newKinds(t, ownIVs).mustStart()
					defer r.stop()
					r.create("shop")
					r.alone(from)
					wrapped := r.wrap("shop")
					wantIVs(t, [][]byte{wrapped}, []int{max(ownIVs[from], envelope.IVSize)})
					r.alone(to)
					r.wantUnwrap("shop", wrapped)
				})
			})
		}
	}
}

// alone takes all members away but for one.
func (r *rig) alone(only int) {
	r.t.Helper()
	for _, h := range r.hsms {
		h.come()
	}
	r.wantStates(slices.Repeat([]api.MemberState{api.MemberActive}, len(r.hsms))...)
	states := slices.Repeat([]api.MemberState{api.MemberDown}, len(r.hsms))
	states[only] = api.MemberActive
	for i, h := range r.hsms {
		if i != only {
			h.leave()
		}
	}
	r.wantStates(states...)
}

func TestRekeyWithTokensThatChooseTheirIVs(t *testing.T) {
	const keys = 90
	for _, c := range tokenKinds {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newKinds(t, c.ownIVs).mustStart()
				defer r.stop()
				versions := r.fillShop(keys)
				if job := r.wantJob(r.rekey(api.RekeyOptions{}).ID, api.JobDone); job.Progress.Done != versions || job.Failed != 0 {
					t.Errorf("the job is %+v, want %d done", job, versions)
				}
				r.wantShop(keys, 2)
			})
		})
	}
}

// The next version of a data key is as long as the newest, whichever envelope that has.
func TestRotatedDataKeyKeepsItsLength(t *testing.T) {
	for _, ownIV := range []int{0, 12, 16} {
		for _, size := range []int{1, 16, 24, 33, api.MaxDataKey} {
			t.Run(fmt.Sprintf("%d bytes, IVs of %d", size, ownIV), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := newKinds(t, []int{ownIV}).mustStart()
					defer r.stop()
					if _, err := r.CreateDatabase(t.Context(), "shop", api.DatabaseOptions{}); err != nil {
						t.Fatal(err)
					}
					if _, err := r.PutNamedKey(t.Context(), "shop", "1", api.NamedKeyPut{Bytes: size}); err != nil {
						t.Fatal(err)
					}
					if _, err := r.RotateNamedKey(t.Context(), "shop", "1"); err != nil {
						t.Fatal(err)
					}
					k, err := r.NamedKey(t.Context(), "shop", "1", 0)
					if err != nil || k.Version != 2 || len(k.Plaintext) != size {
						t.Errorf("version %d has %d bytes, %v", k.Version, len(k.Plaintext), err)
					}
				})
			})
		}
	}
}

// A token that takes one of its IVs twice has no randomness to speak of. Nothing that it
// has wrapped so gets out, and what was there stays as it was.
func TestRekeyRefusesOneIVForTwo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		h := r.hsms[0]
		var stuck atomic.Bool
		r.group.Members[0].Open = func(context.Context) (pluginproto.Driver, error) {
			return &liar{Driver: memdriver.New(memdriver.Options{Token: h.token}), result: func(res *pluginproto.Result) {
				for i := range res.Items {
					if stuck.Load() && res.Items[i].IV != nil {
						res.Items[i].IV = []byte("the same one")
					}
				}
			}}, nil
		}
		r.mustStart()
		defer r.stop()
		r.fillShop(9)
		stuck.Store(true)
		id := r.rekey(api.RekeyOptions{}).ID
		if job := r.wantJob(id, api.JobWaiting); job.Progress.Done != 0 || !strings.Contains(job.Reason, "used one IV twice") {
			t.Errorf("the job is %+v", job)
		}
		r.wantShop(9, 1)
		stuck.Store(false)
		r.wantJob(id, api.JobDone)
		r.wantShop(9, 2)
	})
}

// Envelopes of the first format stand in databases, and are read for ever.
func TestEnvelopesOfTheFirstFormatUnwrap(t *testing.T) {
	for _, c := range tokenKinds {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newKinds(t, c.ownIVs).mustStart()
				defer r.stop()
				r.create("shop")
				first := firstFormat(t, r, "shop")
				for range 6 {
					r.wantUnwrap("shop", first)
				}
				if _, err := r.Rotate(t.Context(), "shop"); err != nil {
					t.Fatal(err)
				}
				moved, err := r.Rewrap(t.Context(), "shop", first, []byte("aad"))
				if err != nil || moved[4] != 2 {
					t.Fatalf("rewrapped as format %d, %v", moved[4], err)
				}
				r.wantUnwrap("shop", moved)
				first[30] ^= 1 // in its IV
				_, err = r.Unwrap(t.Context(), "shop", first, []byte("aad"))
				wantError(t, err, kms.ErrCorrupt, "does not authenticate")
			})
		})
	}
}

// firstFormat makes an envelope as the first kmsd did, past the service.
func firstFormat(t *testing.T, r *rig, name string) []byte {
	t.Helper()
	id := r.identity(name, 1)
	iv := []byte("a random IV!")
	header := append([]byte("KMSD\x01\x01"), id[:]...)
	header = append(header, iv...)
	d := openAs(t, memdriver.New(memdriver.Options{Token: r.hsms[0].token}))
	defer d.Kill()
	res, err := d.Do(t.Context(), pluginproto.Command{
		Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: id, IV: iv,
		Input: plaintextOf(name), AAD: append(bytes.Clone(header), "aad"...),
	})
	if err != nil {
		t.Fatal(err)
	}
	return append(header, res.Output...)
}
