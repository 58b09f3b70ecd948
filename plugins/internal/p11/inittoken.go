package p11

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// maxInitRequest is the longest request for a token, in bytes.
const maxInitRequest = 16 << 10

// InitToken makes a new token in a free slot. It reads one JSON object with the
// members label, pin, so_pin and any setting that is not about choosing a token
// (module, softhsm_conf); it writes the serial number and the slot as one. The
// PINs come through a pipe, so that no process list shows them.
func (q Quirks) InitToken(in io.Reader, out io.Writer) error {
	r, err := q.readInitRequest(in)
	if err != nil {
		return err
	}
	others := r.settings.apart()
	defer others.end()
	others.writing()
	lib, err := load(r.settings)
	if err != nil {
		return err
	}
	defer lib.Destroy()
	if err := lib.Initialize(); err != nil {
		return q.Codes.fail("initialising the library", err)
	}
	defer lib.Finalize() // the process is about to end; nothing depends on it
	if err := q.initToken(lib, r); err != nil {
		return err
	}
	slot, info, err := q.findLabel(lib, r.settings.label)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(map[string]any{"serial": info.SerialNumber, "slot": slot})
}

type initRequest struct {
	settings   settings
	pin, soPIN string
}

func (q Quirks) readInitRequest(in io.Reader) (initRequest, error) {
	raw, err := io.ReadAll(io.LimitReader(in, maxInitRequest+1))
	if err != nil {
		return initRequest{}, fmt.Errorf("reading the request: %w", err)
	}
	defer clear(raw)
	if len(raw) > maxInitRequest {
		return initRequest{}, fmt.Errorf("the request is longer than %d bytes", maxInitRequest)
	}
	var fields map[string]string
	if err := json.Unmarshal(raw, &fields); err != nil {
		// The cause may quote the request, and a PIN with it.
		return initRequest{}, errors.New("the request is not one JSON object with strings")
	}
	r := initRequest{pin: fields["pin"], soPIN: fields["so_pin"]}
	set := map[string]string{settingLabel: fields["label"]}
	var faults []string
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		switch _, env := q.Env[name]; {
		case name == "label" || name == "pin" || name == "so_pin":
			if fields[name] == "" {
				faults = append(faults, name+" is empty")
			}
		case env || name == settingModule:
			set[name] = fields[name]
		default:
			faults = append(faults, fmt.Sprintf("unknown member %q", name))
		}
	}
	for _, name := range []string{"label", "pin", "so_pin"} {
		if _, given := fields[name]; !given {
			faults = append(faults, name+" is missing")
		}
	}
	if len(faults) > 0 {
		return initRequest{}, errors.New(strings.Join(faults, "; "))
	}
	r.settings, err = q.readSettings(set)
	return r, err
}

// initToken initialises a free slot and sets the user PIN.
func (q Quirks) initToken(lib *pkcs11.Ctx, r initRequest) error {
	op := fmt.Sprintf("making the token %q", r.settings.label)
	switch _, _, err := q.findLabel(lib, r.settings.label); {
	case err == nil:
		return pluginproto.Errorf(pluginproto.ClassCaller, op, "there is a token with this label already; it is left as it is")
	case !errors.Is(err, errNoLabel):
		return err
	}
	slot, info, err := q.freeSlot(lib)
	if err != nil {
		return err
	}
	// A PIN that is refused after C_InitToken would leave half a token behind.
	for _, pin := range []string{r.pin, r.soPIN} {
		if n := uint(len(pin)); n < info.MinPinLen || n > info.MaxPinLen {
			return &pluginproto.Error{Class: pluginproto.ClassCaller, CKR: pkcs11.CKR_PIN_LEN_RANGE, Op: op,
				Msg: fmt.Sprintf("a PIN has %d to %d bytes", info.MinPinLen, info.MaxPinLen)}
		}
	}
	if err := lib.InitToken(slot, r.soPIN, r.settings.label); err != nil {
		return q.Codes.fail(op, err)
	}
	sh, err := lib.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return q.Codes.fail("opening a session on the new token", err)
	}
	defer lib.CloseSession(sh)
	if err := lib.Login(sh, pkcs11.CKU_SO, r.soPIN); err != nil {
		return q.Codes.fail("logging in as security officer", err)
	}
	if err := lib.InitPIN(sh, r.pin); err != nil {
		return q.Codes.fail("setting the user PIN", err)
	}
	return q.Codes.fail("logging out", lib.Logout(sh))
}

var errNoLabel = errors.New("there is no token with this label")

func (q Quirks) findLabel(lib *pkcs11.Ctx, label string) (uint, pkcs11.TokenInfo, error) {
	slots, err := lib.GetSlotList(true)
	if err != nil {
		return 0, pkcs11.TokenInfo{}, q.Codes.fail("listing the slots", err)
	}
	for _, slot := range slots {
		info, err := lib.GetTokenInfo(slot)
		if err == nil && info.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0 && info.Label == label {
			return slot, info, nil
		}
	}
	return 0, pkcs11.TokenInfo{}, errNoLabel
}

func (q Quirks) freeSlot(lib *pkcs11.Ctx) (uint, pkcs11.TokenInfo, error) {
	slots, err := lib.GetSlotList(true)
	if err != nil {
		return 0, pkcs11.TokenInfo{}, q.Codes.fail("listing the slots", err)
	}
	for _, slot := range slots {
		info, err := lib.GetTokenInfo(slot)
		if err == nil && info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			return slot, info, nil
		}
	}
	return 0, pkcs11.TokenInfo{}, pluginproto.Errorf(pluginproto.ClassMember, "looking for a free slot", "there is none")
}
