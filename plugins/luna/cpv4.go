package main

import (
	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/internal/vendor"
)

// CPv4 carries many objects through one tunnel. The target begins, so the first word of the
// source is empty; the order is that of the tests of Thales' Python binding:
//
//	source  nothing                → target  CA_MigrationStartSessionNegotiation    [step, blob 1]
//	source  ...Continue            → target  ...Continue                           nothing
//	        [step, blob 2, tunnel]
//	source  CA_Extract             → target  CA_Insert
//	        [return value, blob, ...]
//
// When the objects have arrived both ends close the tunnel. CA_Extract and CA_Insert want
// blob 2 again.
type tunnel struct {
	lib   *vendor.Library
	at    p11.Place
	steps int
	blob2 []byte
	id    []byte // empty before there is a tunnel
}

func (t *tunnel) Close() {
	if len(t.id) > 0 {
		// The HSM lets go of it too when the session is closed, which comes next (inferred).
		_ = t.lib.NegotiationClose(t.at.Session, t.id)
	}
	t.id = nil
}

type cpv4Source struct{ tunnel }

func (s *cpv4Source) Step(in []byte, give []pkcs11.ObjectHandle) (out []byte, done bool, err error) {
	s.steps++
	switch s.steps {
	case 1:
		return nil, false, nil
	case 2:
		out, err = s.agree(in)
		return out, false, err
	case 3:
		out, err = s.extract(give)
		return out, false, err // the tunnel stays until the objects have arrived
	}
	return nil, false, unreadable()
}

func (s *cpv4Source) extract(give []pkcs11.ObjectHandle) ([]byte, error) {
	blobs, err := s.lib.Extract(s.at.Session, s.blob2, s.id, give)
	if err != nil {
		return nil, err
	}
	return packBlobs(blobs), nil
}

// agree answers the target's hello.
func (s *cpv4Source) agree(in []byte) ([]byte, error) {
	said, err := unpackN(in, 2)
	if err != nil {
		return nil, err
	}
	step, err := numberOf(said[0])
	if err != nil {
		return nil, err
	}
	n, err := s.lib.NegotiationContinue(s.at.Session, step, said[1])
	if err != nil {
		return nil, err
	}
	if len(n.Tunnel) == 0 {
		return nil, pluginproto.Errorf(pluginproto.ClassMember, "negotiating a cloning tunnel", "the HSM agreed and named no tunnel")
	}
	s.blob2, s.id = n.Out, n.Tunnel
	return pack(number(n.Step), n.Out, n.Tunnel), nil
}

type cpv4Target struct {
	tunnel
	objects int
	doubt   error // what the last call of the negotiation answered
}

func (t *cpv4Target) Step(in []byte) (out []byte, received []p11.Received, done bool, err error) {
	t.steps++
	switch t.steps {
	case 1:
		step, hello, err := t.lib.NegotiationStart(t.at.Session)
		if err != nil {
			return nil, nil, false, err
		}
		return pack(number(step), hello), nil, false, nil
	case 2:
		return nil, nil, false, t.agree(in)
	}
	received, err = t.insert(in)
	return nil, received, err == nil, err
}

func (t *cpv4Target) Due() bool { return t.steps == 2 }

// agree ends the negotiation. Thales' tests do not look at what the call answers, "until a fix
// in the library": it may be an error although the tunnel stands. So the objects decide, and
// the answer is kept for the case that they do not arrive.
func (t *cpv4Target) agree(in []byte) error {
	said, err := unpackN(in, 3)
	if err != nil {
		return err
	}
	step, err := numberOf(said[0])
	if err != nil {
		return err
	}
	t.blob2, t.id = said[1], said[2]
	_, t.doubt = t.lib.NegotiationContinue(t.at.Session, step, t.blob2)
	return nil
}

// explain says why no object arrived: there was no tunnel, where the negotiation said so, unless
// it is the HSM that is in trouble or full, which it would be with one.
func (t *cpv4Target) explain(err error) error {
	code, known := codes[ckrOf(err)]
	trouble := !known || code.Class == pluginproto.ClassMember || code.Class == pluginproto.ClassBusy
	if t.doubt == nil || trouble && !isRefusal(err) {
		return err
	}
	return t.doubt
}

// insert takes the objects that the source could give.
func (t *cpv4Target) insert(in []byte) ([]p11.Received, error) {
	received, blobs, err := unpackBlobs(in, t.objects)
	if err != nil || len(blobs) == 0 {
		return received, err
	}
	arrivals, err := t.lib.Insert(t.at.Session, t.blob2, t.id, blobs)
	if err != nil {
		return nil, t.explain(err)
	}
	for i := range received {
		if received[i].Err == nil {
			received[i], arrivals = p11.Received{Object: arrivals[0].Object, Err: arrivals[0].Err}, arrivals[1:]
		}
	}
	return received, nil
}
