package pluginproto

import driverv1 "kmsd/pluginproto/v1"

// The checks here hold on both sides of the wall: the core asks them before it
// sends, the driver's side before the driver sees the request.

func (r OpenRequest) check() error {
	const op = "opening the token"
	if len(r.PIN) > maxSecret || len(r.Domain) > maxSecret {
		return Errorf(ClassCaller, op, "a PIN or a domain secret of more than %d bytes", maxSecret)
	}
	if len(r.Settings) > maxSettings {
		return Errorf(ClassCaller, op, "%d settings, at most %d are possible", len(r.Settings), maxSettings)
	}
	for name, value := range r.Settings {
		if len(name) > maxSetting || len(value) > maxSetting {
			return Errorf(ClassCaller, op, "a setting of more than %d bytes", maxSetting)
		}
	}
	return nil
}

func (s KeySpec) check() error {
	const op = "generating a key"
	if !s.Type.known() {
		return Errorf(ClassCaller, op, "key type %q is not in the contract", text(string(s.Type)))
	}
	if s.ID == (KeyID{}) {
		return Errorf(ClassCaller, op, "the identity is all zero")
	}
	return checkLabel(op, s.Label)
}

func (a Attributes) check() error {
	if a.Label == nil {
		return nil
	}
	return checkLabel("setting attributes", *a.Label)
}

func checkLabel(op, label string) error {
	if len(label) > MaxLabel || text(label) != label {
		return Errorf(ClassCaller, op, "the label is not UTF-8 text of at most %d bytes", MaxLabel)
	}
	return nil
}

func (r CloneRequest) check() error {
	const (
		op       = "cloning a key"
		maxSteps = 64 // the longest protocol in use has 4
	)
	switch {
	case r.Role != CloneSource && r.Role != CloneTarget:
		return Errorf(ClassCaller, op, "role %d is not in the contract", r.Role)
	case r.Step < 0 || r.Step > maxSteps:
		return Errorf(ClassCaller, op, "step %d, at most %d are possible", r.Step, maxSteps)
	case r.Prove && (r.Role != CloneTarget || r.Step != 0):
		return Errorf(ClassCaller, op, "only a target proves a blob, and in one step")
	case len(r.Blob) > MaxBlob:
		return Errorf(ClassCaller, op, "a blob of %d bytes, at most %d are possible", len(r.Blob), MaxBlob)
	}
	return nil
}

func cloneRequestOf(m *driverv1.CloneStepRequest) (CloneRequest, error) {
	transfer, err := keyID(m.GetTransfer()) // of the same shape
	if err != nil {
		return CloneRequest{}, err
	}
	key, err := keyID(m.GetKey())
	if err != nil {
		return CloneRequest{}, err
	}
	role := m.GetRole()
	if role < 0 || role > 0xFF {
		role = driverv1.CloneRole_CLONE_ROLE_UNSPECIFIED
	}
	req := CloneRequest{
		Transfer: transfer,
		Role:     CloneRole(role),
		Step:     int(min(m.GetStep(), 0xFFFF)),
		Key:      key,
		Blob:     m.GetBlob(),
		Prove:    m.GetProve(),
	}
	return req, req.check()
}

// cloneReplyOf reads one end's answer to req off the wire.
func cloneReplyOf(req CloneRequest, m *driverv1.CloneStepReply) (CloneReply, error) {
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
	o, err := answered(req.Key, m.GetObject())
	if err != nil {
		return CloneReply{}, err
	}
	reply.Object = &o
	return reply, nil
}
