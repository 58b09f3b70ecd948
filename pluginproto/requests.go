package pluginproto

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
