package pluginproto

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	driverv1 "kmsd/pluginproto/v1"
)

func TestStatusCodesEndHere(t *testing.T) {
	live := context.Background()
	ended, cancel := context.WithCancel(live)
	cancel()
	for _, tc := range []struct {
		name      string
		ctx       context.Context
		err       error
		class     Class
		ckr       uint
		permanent bool
		text      string
	}{
		{"the driver's own failure", live, statusOf(&Error{Class: ClassNotFound, Op: "looking"}), ClassNotFound, CKROK, false, "looking"},
		{"the driver's own failure, permanent", live, statusOf(&Error{Class: ClassMember, CKR: CKRPINIncorrect, Op: "logging in", Permanent: true}), ClassMember, CKRPINIncorrect, true, "logging in: CKR_PIN_INCORRECT"},
		{"no connection", live, status.Error(codes.Unavailable, "connection refused"), ClassMember, CKRDeviceError, false, "calling: CKR_DEVICE_ERROR: the driver process is gone"},
		{"the end of the stream", live, io.EOF, ClassMember, CKRDeviceError, false, "the connection to the driver failed: EOF"},
		{"our context was cancelled", ended, status.Error(codes.Canceled, "context canceled"), ClassCaller, CKROK, false, "calling: context canceled"},
		{"a cancellation that is not ours", live, status.Error(codes.Canceled, "closing"), ClassMember, CKRDeviceError, false, "the driver process is gone"},
		{"a deadline that is not ours", live, status.Error(codes.DeadlineExceeded, ""), ClassMember, CKRDeviceError, false, "the driver process is gone"},
		{"a call the driver does not have", live, status.Error(codes.Unimplemented, "unknown method"), ClassMember, CKROK, true, "install the one of this release"},
		{"a message over the limit", live, status.Error(codes.ResourceExhausted, "5 vs. 4"), ClassMember, CKROK, false, "larger than the contract allows: 5 vs. 4"},
		{"a status of the transport", live, status.Error(codes.Internal, "stream reset"), ClassMember, CKRDeviceError, false, "the connection to the driver failed: stream reset"},
		{"not found by the transport is not absence", live, status.Error(codes.NotFound, "no such path"), ClassMember, CKRDeviceError, false, "no such path"},
		{"an error without status", live, errors.New("odd"), ClassMember, CKRDeviceError, false, "odd"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := errorOfCall(tc.ctx, "calling", tc.err)
			if ClassOf(err) != tc.class || CKROf(err) != tc.ckr {
				t.Errorf("error %v is of class %s with %s, want %s with %s", err, ClassOf(err), CKRName(CKROf(err)), tc.class, CKRName(tc.ckr))
			}
			if e := (*Error)(nil); tc.permanent && (!errors.As(err, &e) || !e.Permanent) {
				t.Errorf("error %v is not permanent", err)
			}
			if !strings.Contains(err.Error(), tc.text) {
				t.Errorf("error %q does not say %q", err, tc.text)
			}
		})
	}
}

func TestFailures(t *testing.T) {
	for _, tc := range []struct {
		name  string
		in    *driverv1.Failure
		class Class
		is    error
		text  string
	}{
		{"none given", &driverv1.Failure{}, ClassUnknown, nil, "calling the driver"},
		{"busy", &driverv1.Failure{Class: driverv1.Class_CLASS_BUSY, Op: "waiting"}, ClassBusy, nil, "waiting"},
		{"an expired deadline", &driverv1.Failure{Class: driverv1.Class_CLASS_EXPIRED}, ClassCaller, context.DeadlineExceeded, "waiting in the driver"},
		{"a class from elsewhere", &driverv1.Failure{Class: 77}, ClassMember, nil, "error class 77 is not in the contract"},
		{"a text without end", &driverv1.Failure{Msg: strings.Repeat("ä", maxText)}, ClassUnknown, nil, "ä"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := errorOf(tc.in)
			if ClassOf(err) != tc.class || tc.is != nil && !errors.Is(err, tc.is) || !strings.Contains(err.Error(), tc.text) {
				t.Errorf("error %q of class %s, want class %s and %q", err, ClassOf(err), tc.class, tc.text)
			}
			if len(err.Error()) > 2*maxText {
				t.Errorf("a text of %d bytes", len(err.Error()))
			}
		})
	}
}
