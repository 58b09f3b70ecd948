package pluginproto

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	driverv1 "kmsd/pluginproto/v1"
)

// failureOf puts a driver's error on the wire. What is wrapped around an [*Error]
// stays in front of what it was doing.
func failureOf(err error) *driverv1.Failure {
	var e *Error
	switch {
	case errors.As(err, &e):
		around := strings.TrimSuffix(err.Error(), e.Error())
		return &driverv1.Failure{
			Class:     wireClass(e.Class),
			Ckr:       uint64(e.CKR),
			Op:        text(around + e.Op),
			Msg:       text(e.Msg),
			Permanent: e.Permanent,
		}
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return &driverv1.Failure{Class: driverv1.Class_CLASS_EXPIRED, Msg: text(err.Error())}
	default:
		return &driverv1.Failure{Class: driverv1.Class_CLASS_UNSPECIFIED, Msg: text(err.Error())}
	}
}

// errorOf reads what failureOf wrote. A class that is not in the contract is the
// driver's fault.
func errorOf(f *driverv1.Failure) error {
	e := &Error{CKR: uint(f.GetCkr()), Op: text(f.GetOp()), Msg: text(f.GetMsg()), Permanent: f.GetPermanent()}
	switch f.GetClass() {
	case driverv1.Class_CLASS_UNSPECIFIED:
		e.Class = ClassUnknown
	case driverv1.Class_CLASS_CALLER:
		e.Class = ClassCaller
	case driverv1.Class_CLASS_NOT_FOUND:
		e.Class = ClassNotFound
	case driverv1.Class_CLASS_BUSY:
		e.Class = ClassBusy
	case driverv1.Class_CLASS_MEMBER:
		e.Class = ClassMember
	case driverv1.Class_CLASS_EXPIRED:
		return fmt.Errorf("waiting in the driver: %w", context.DeadlineExceeded)
	default:
		return badReply("error class %d is not in the contract", f.GetClass())
	}
	return e
}

func wireClass(c Class) driverv1.Class {
	switch c {
	case ClassCaller:
		return driverv1.Class_CLASS_CALLER
	case ClassNotFound:
		return driverv1.Class_CLASS_NOT_FOUND
	case ClassBusy:
		return driverv1.Class_CLASS_BUSY
	case ClassMember:
		return driverv1.Class_CLASS_MEMBER
	default:
		return driverv1.Class_CLASS_UNSPECIFIED
	}
}

// statusOf carries a driver's error over a unary call: a gRPC status whose details
// hold the failure. Its code is for a reader of a trace; nobody decides by it.
func statusOf(err error) error {
	st, detailErr := status.New(codes.Aborted, "the driver answered with a failure").WithDetails(failureOf(err))
	if detailErr != nil {
		return status.Error(codes.Internal, "describing the driver's failure: "+detailErr.Error())
	}
	return st.Err()
}

// errorOfCall is where gRPC status codes die: what a call on the connection gave
// becomes an [*Error], or the error of a context that ended.
func errorOfCall(ctx context.Context, op string, err error) error {
	st, _ := status.FromError(err)
	for _, d := range st.Details() {
		if f, ok := d.(*driverv1.Failure); ok {
			return errorOf(f)
		}
	}
	switch st.Code() {
	case codes.Canceled, codes.DeadlineExceeded:
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", op, ctx.Err())
		}
		return gone(op)
	case codes.Unimplemented:
		e := Errorf(ClassMember, op, "the driver does not know this call; install the one of this release")
		e.Permanent = true
		return e
	case codes.ResourceExhausted:
		return Errorf(ClassMember, op, "the message is larger than the contract allows: %s", text(st.Message()))
	case codes.Unavailable:
		return gone(op)
	default: // io.EOF at the end of a stream is here, too
		return &Error{
			Class: ClassMember, CKR: CKRDeviceError, Op: op,
			Msg: "the connection to the driver failed: " + text(st.Message()),
		}
	}
}

// gone is the failure of a call whose driver process, or the connection to it, has
// ended.
func gone(op string) *Error {
	return &Error{Class: ClassMember, CKR: CKRDeviceError, Op: op, Msg: "the driver process is gone"}
}

// badReply is the failure of a call that the driver answered against the contract.
func badReply(format string, args ...any) *Error {
	return Errorf(ClassMember, "reading the driver's answer", format, args...)
}

// text makes s fit to be sent and shown: valid UTF-8 of bounded length.
func text(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}
