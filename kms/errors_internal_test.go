package kms

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/hashicorp/go-hclog"

	"kmsd/kms/api"
	"kmsd/kms/catalog"
	"kmsd/kms/internal/envelope"
	"kmsd/kms/internal/group"
	"kmsd/kms/internal/replica"
	"kmsd/pluginproto"
)

func TestTranslate(t *testing.T) {
	driver := func(class pluginproto.Class, ckr uint) error {
		return &group.MemberError{Member: "hsm-b", Err: &pluginproto.Error{Class: class, CKR: ckr, Op: "decrypting"}}
	}
	for _, c := range []struct {
		name   string
		err    error
		code   api.Code
		ckr    string
		member string
	}{
		{"a request that no token can do", driver(pluginproto.ClassCaller, 0x70), api.CodeBadRequest, "CKR_MECHANISM_INVALID", "hsm-b"},
		{"a tag that does not fit", driver(pluginproto.ClassCaller, pluginproto.CKREncryptedDataInvalid), api.CodeCorrupt, "CKR_ENCRYPTED_DATA_INVALID", "hsm-b"},
		{"a member without the key", driver(pluginproto.ClassNotFound, 0x82), api.CodeUnavailable, "CKR_OBJECT_HANDLE_INVALID", "hsm-b"},
		{"a busy member", driver(pluginproto.ClassBusy, 0xB1), api.CodeUnavailable, "CKR_SESSION_COUNT", "hsm-b"},
		{"a broken member", driver(pluginproto.ClassMember, pluginproto.CKRDeviceError), api.CodeUnavailable, "CKR_DEVICE_ERROR", "hsm-b"},
		{"a failure nobody understands", driver(pluginproto.ClassUnknown, pluginproto.CKRGeneralError), api.CodeUnavailable, "CKR_GENERAL_ERROR", "hsm-b"},
		{"no member left", fmt.Errorf("group default: %w: %w", group.ErrLost, driver(pluginproto.ClassMember, pluginproto.CKRDeviceError)), api.CodeGroupLost, "CKR_DEVICE_ERROR", "hsm-b"},
		{"no member left, the last one too slow", fmt.Errorf("%w: %w", group.ErrLost, context.DeadlineExceeded), api.CodeGroupLost, "", ""},
		{"time is over", fmt.Errorf("group default: %w", context.DeadlineExceeded), api.CodeDeadline, "", ""},
		{"time is over while a member had not the key", fmt.Errorf("%w (last: %w)", context.DeadlineExceeded, driver(pluginproto.ClassNotFound, 0)), api.CodeDeadline, "", "hsm-b"},
		{"the caller went away", context.Canceled, api.CodeDeadline, "", ""},
		{"a member that somebody else has changed", fmt.Errorf("draining member hsm-c: %w", group.ErrOvertaken), api.CodeState, "", ""},
		{"a member that does not serve", &group.MemberError{Member: "hsm-c", Err: group.ErrNotInStep}, api.CodeMemberFailed, "", "hsm-c"},
		{"a member that there is not", &group.MemberError{Member: "hsm-x", Err: group.ErrUnknownMember}, api.CodeNotFound, "", "hsm-x"},
		{"a member that there is already", fmt.Errorf("adding hsm-a: %w", group.ErrMemberExists), api.CodeExists, "", ""},
		{"the last active member", &group.MemberError{Member: "hsm-a", Err: group.ErrLastActive}, api.CodeState, "", "hsm-a"},
		{"the group is closed", group.ErrClosed, api.CodeUnavailable, "", ""},
		{"the service is closed", errClosed, api.CodeUnavailable, "", ""},
		{"not an envelope", fmt.Errorf("%w: it is cut short", envelope.ErrFormat), api.CodeCorrupt, "", ""},
		{"somebody was faster", fmt.Errorf("writing key: %w", catalog.ErrConflict), api.CodeUnavailable, "", ""},
		{"a copy of another value", errors.Join(replica.ErrDifferent, driver(pluginproto.ClassMember, 0)), api.CodeInternal, "", "hsm-b"},
		{"a record the catalog has lost", fmt.Errorf("reading key: %w", catalog.ErrNotFound), api.CodeInternal, "", ""},
		{"a disk without room", fmt.Errorf("writing: %w: %w", catalog.ErrFull, syscall.ENOSPC), api.CodeUnavailable, "", ""},
		{"a disk that fails", fmt.Errorf("writing: %w", syscall.EIO), api.CodeInternal, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := translate("unwrapping", c.err)
			e, ok := errors.AsType[*api.Error](err)
			if !ok {
				t.Fatalf("got a %T", err)
			}
			if e.Code != c.code || e.CKR != c.ckr || e.Member != c.member {
				t.Errorf("got %s, %q, %q, want %s, %q, %q", e.Code, e.CKR, e.Member, c.code, c.ckr, c.member)
			}
			if want := "unwrapping: " + c.err.Error(); e.Message != want {
				t.Errorf("says %q, want %q", e.Message, want)
			}
			if !errors.Is(err, c.err) {
				t.Error("the cause is gone")
			}
			if again := translate("doing more", err); again != err {
				t.Errorf("translated again it is %v", again)
			}
		})
	}
	if err := translate("unwrapping", nil); err != nil {
		t.Errorf("no failure became %v", err)
	}
}

func TestPINIsNotTriedTwice(t *testing.T) {
	p, err := newPINs()
	if err != nil {
		t.Fatal(err)
	}
	wrong := &pluginproto.Error{Class: pluginproto.ClassMember, CKR: pluginproto.CKRPINIncorrect}
	if err := p.check("g/hsm-a", "hsm-a", []byte("1")); err != nil {
		t.Errorf("a PIN that was never tried: %v", err)
	}
	p.note("g/hsm-a", []byte("1"), wrong)
	err = p.check("g/hsm-a", "hsm-a", []byte("1"))
	if e, ok := errors.AsType[*pluginproto.Error](err); !ok || !e.Permanent || e.CKR != pluginproto.CKRPINIncorrect {
		t.Errorf("a PIN that was refused: %v", err)
	}
	if err := p.check("g/hsm-a", "hsm-a", []byte("2")); err != nil {
		t.Errorf("another PIN: %v", err)
	}
	if err := p.check("g/hsm-b", "hsm-a", []byte("1")); err != nil {
		t.Errorf("the same PIN on another token: %v", err)
	}
	p.note("g/hsm-a", []byte("2"), errors.New("no such slot"))
	if err := p.check("g/hsm-a", "hsm-a", []byte("1")); err == nil {
		t.Error("another failure made it forget")
	}
	p.forget("g/hsm-a")
	if err := p.check("g/hsm-a", "hsm-a", []byte("1")); err != nil {
		t.Errorf("when the token is another: %v", err)
	}
	p.note("g/hsm-a", []byte("1"), wrong)
	p.note("g/hsm-a", []byte("2"), nil)
	if err := p.check("g/hsm-a", "hsm-a", []byte("1")); err != nil {
		t.Errorf("after a login: %v", err)
	}
}

func TestSlowReaderGetsTheNewestEvents(t *testing.T) {
	h := newHub(hclog.NewNullLogger())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	slow := h.listen(ctx)
	for i := range maxWaiting + 10 {
		h.publish(api.Event{Type: "key", Key: fmt.Sprint(i)})
	}
	h.close()
	var got []api.Event
	for e := range slow {
		got = append(got, e)
	}
	if len(got) != maxWaiting+1 || got[0].Type != api.EventDropped || got[0].Cause != "10 events were dropped: the reader is too slow" {
		t.Fatalf("got %d events, the first %+v", len(got), got[0])
	}
	if first, last := got[1].Key, got[maxWaiting].Key; first != "10" || last != fmt.Sprint(maxWaiting+9) {
		t.Errorf("got events %s to %s, want 10 to %d", first, last, maxWaiting+9)
	}
	for range h.listen(ctx) {
		t.Error("an event after the end")
	}
}

func TestReaderThatLeavesIsForgotten(t *testing.T) {
	h := newHub(hclog.NewNullLogger())
	ctx, cancel := context.WithCancel(t.Context())
	events := h.listen(ctx)
	h.publish(api.Event{Type: "key"})
	for range events {
		break
	}
	if n := len(h.readers); n != 0 {
		t.Errorf("%d readers after a break", n)
	}
	_ = h.listen(ctx) // never looped over
	cancel()
	for range h.listen(ctx) {
		t.Error("an event though the context has ended")
	}
}
