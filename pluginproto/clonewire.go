package pluginproto

import (
	"strings"

	driverv1 "kmsd/pluginproto/v1"
)

const (
	cloneOp       = "cloning a key"
	maxCloneSteps = 64 // the longest protocol in use has 4
)

func (r CloneRequest) check() error {
	switch {
	case r.Role != CloneSource && r.Role != CloneTarget:
		return Errorf(ClassCaller, cloneOp, "role %d is not in the contract", r.Role)
	case !isProtocol(r.Protocol):
		return Errorf(ClassCaller, cloneOp, "protocol %q is not the name of one", text(r.Protocol))
	case r.Step < 0 || r.Step > maxCloneSteps:
		return Errorf(ClassCaller, cloneOp, "step %d, at most %d are possible", r.Step, maxCloneSteps)
	case r.Prove && (r.Role != CloneTarget || r.Step != 0 || len(r.Keys) != 1):
		return Errorf(ClassCaller, cloneOp, "only a target proves a blob, of one key, in one step")
	case r.End && (r.Step != 0 || len(r.Blob) > 0 || r.Prove):
		return Errorf(ClassCaller, cloneOp, "the end of a transfer has no step and no blob")
	case len(r.Blob) > MaxBlob:
		return Errorf(ClassCaller, cloneOp, "a blob of %d bytes, at most %d are possible", len(r.Blob), MaxBlob)
	}
	return checkCloneKeys(r.Keys)
}

func checkCloneKeys(keys []KeyID) error {
	if len(keys) < 1 || len(keys) > MaxCloneKeys {
		return Errorf(ClassCaller, cloneOp, "%d keys in one transfer, 1 to %d are possible", len(keys), MaxCloneKeys)
	}
	seen := make(map[KeyID]bool, len(keys))
	for _, id := range keys {
		if seen[id] {
			return Errorf(ClassCaller, cloneOp, "key %s is in one transfer twice", id)
		}
		seen[id] = true
	}
	return nil
}

// isProtocol reports whether a name can be that of a clone protocol: a short word.
func isProtocol(name string) bool {
	return len(name) > 0 && len(name) <= maxProtocol && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-.") == ""
}

func cloneRequestOf(m *driverv1.CloneStepRequest) (CloneRequest, error) {
	transfer, err := keyID(m.GetTransfer()) // of the same shape
	if err != nil {
		return CloneRequest{}, err
	}
	if len(m.GetKeys()) > MaxCloneKeys {
		return CloneRequest{}, Errorf(ClassCaller, cloneOp, "%d keys in one transfer", len(m.GetKeys()))
	}
	keys := make([]KeyID, len(m.GetKeys()))
	for i, b := range m.GetKeys() {
		if keys[i], err = keyID(b); err != nil {
			return CloneRequest{}, err
		}
	}
	role := m.GetRole()
	if role < 0 || role > 0xFF {
		role = driverv1.CloneRole_CLONE_ROLE_UNSPECIFIED
	}
	req := CloneRequest{
		Transfer: transfer,
		Role:     CloneRole(role),
		Protocol: m.GetProtocol(),
		Step:     int(min(m.GetStep(), 0xFFFF)),
		Keys:     keys,
		Blob:     m.GetBlob(),
		Prove:    m.GetProve(),
		End:      m.GetEnd(),
	}
	return req, req.check()
}

func wireCloneRequest(r CloneRequest) *driverv1.CloneStepRequest {
	m := &driverv1.CloneStepRequest{
		Transfer: r.Transfer[:],
		Role:     driverv1.CloneRole(r.Role),
		Protocol: r.Protocol,
		Step:     uint32(r.Step),
		Keys:     make([][]byte, len(r.Keys)),
		Blob:     r.Blob,
		Prove:    r.Prove,
		End:      r.End,
	}
	for i := range r.Keys {
		m.Keys[i] = r.Keys[i][:]
	}
	return m
}

// cloneReplyOf reads one end's answer to req off the wire.
func cloneReplyOf(req CloneRequest, m *driverv1.CloneStepReply) (CloneReply, error) {
	if req.End {
		return CloneReply{}, nil
	}
	reply := CloneReply{Blob: m.GetBlob(), Done: m.GetDone()}
	if len(reply.Blob) > MaxBlob {
		return CloneReply{}, badReply("a blob of %d bytes, at most %d are possible", len(reply.Blob), MaxBlob)
	}
	if req.Prove && !reply.Done {
		return CloneReply{}, badReply("a blob is proved in one step, and this one is not done")
	}
	if shows := req.Role == CloneSource && req.Step == 0 || req.Role == CloneTarget && reply.Done; !shows {
		return reply, nil
	}
	if len(m.GetKeys()) != len(req.Keys) {
		return CloneReply{}, badReply("answers for %d keys to a transfer of %d", len(m.GetKeys()), len(req.Keys))
	}
	reply.Keys = make([]CloneResult, len(req.Keys))
	for i, r := range m.GetKeys() {
		if f := r.GetFailure(); f != nil && len(req.Keys) > 1 {
			reply.Keys[i].Err = errorOf(f)
			continue
		}
		o, err := answered(req.Keys[i], r.GetObject())
		if err != nil {
			return CloneReply{}, err
		}
		reply.Keys[i].Object = &o
	}
	return reply, nil
}

func wireCloneReply(r CloneReply) *driverv1.CloneStepReply {
	m := &driverv1.CloneStepReply{Blob: r.Blob, Done: r.Done}
	for _, k := range r.Keys {
		out := &driverv1.CloneResult{}
		switch {
		case k.Err != nil:
			out.Result = &driverv1.CloneResult_Failure{Failure: failureOf(k.Err)}
		case k.Object != nil:
			out.Result = &driverv1.CloneResult_Object{Object: wireObject(*k.Object)}
		}
		m.Keys = append(m.Keys, out)
	}
	return m
}

// protocolsOf reads clone protocols off the wire, without those that make no sense.
func protocolsOf(m []*driverv1.CloneProtocol) []CloneProtocol {
	var out []CloneProtocol
	for _, p := range m[:min(len(m), maxProtocols)] {
		if isProtocol(p.GetName()) {
			out = append(out, CloneProtocol{
				Name: p.GetName(), Gives: p.GetGives(), Takes: p.GetTakes(), Alone: p.GetAlone(), BySecret: p.GetBySecret(),
				Keys: int(min(max(p.GetKeys(), 1), MaxCloneKeys)),
			})
		}
	}
	return out
}

func wireProtocols(all []CloneProtocol) []*driverv1.CloneProtocol {
	out := make([]*driverv1.CloneProtocol, len(all))
	for i, p := range all {
		out[i] = &driverv1.CloneProtocol{Name: p.Name, Gives: p.Gives, Takes: p.Takes, Alone: p.Alone, BySecret: p.BySecret, Keys: uint32(max(p.Keys, 1))}
	}
	return out
}

// factsOf reads facts off the wire.
func factsOf(m []*driverv1.Fact) []Fact {
	var out []Fact
	for _, f := range m[:min(len(m), maxFacts)] {
		out = append(out, Fact{Name: text(f.GetName()), Value: text(f.GetValue()), Warning: f.GetWarning()})
	}
	return out
}

func wireFacts(all []Fact) []*driverv1.Fact {
	out := make([]*driverv1.Fact, len(all))
	for i, f := range all {
		out[i] = &driverv1.Fact{Name: text(f.Name), Value: text(f.Value), Warning: f.Warning}
	}
	return out
}
