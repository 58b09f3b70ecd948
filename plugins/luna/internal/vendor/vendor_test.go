package vendor_test

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/internal/vendor"
)

// hostile loads a library that lies in one of its ways.
func hostile(t *testing.T, lie int) *vendor.Library {
	t.Helper()
	so := filepath.Join(t.TempDir(), "hostile.so")
	out, err := exec.CommandContext(t.Context(), "gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror",
		fmt.Sprintf("-DCASE=%d", lie), "-o", so, "testdata/hostile.c").CombinedOutput()
	if err != nil {
		t.Fatalf("compiling: %v\n%s", err, out)
	}
	if _, err := vendor.Load(so); err == nil || !strings.Contains(err.Error(), "is not loaded") {
		t.Errorf("a library that nobody has loaded: %v", err)
	}
	ctx := pkcs11.New(so)
	if ctx == nil {
		t.Fatal("the library cannot be loaded")
	}
	t.Cleanup(ctx.Destroy)
	l, err := vendor.Load(so)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestSizesAreTakenWithinBounds(t *testing.T) {
	for _, tc := range []struct {
		lie  int
		want string // "" means that 8 sevens are answered
	}{
		{1, "asks for a buffer of"},
		{2, "says that it wrote 400 bytes"},
		{3, ""},
		{4, "CKR_BUFFER_TOO_SMALL"},
		{5, "asks for a buffer of 0 bytes"},
	} {
		t.Run(fmt.Sprintf("lie %d", tc.lie), func(t *testing.T) {
			out, err := hostile(t, tc.lie).KEV(1)
			switch {
			case tc.want == "":
				if err != nil || string(out) != strings.Repeat("\x07", 8) {
					t.Errorf("answered %x, %v", out, err)
				}
			case err == nil || !strings.Contains(err.Error(), tc.want):
				t.Errorf("answered %x, %v, want %q", out, err, tc.want)
			case !errors.As(err, new(pkcs11.Error)):
				t.Errorf("%v is no return value", err)
			}
		})
	}
}

func TestCountsAreTakenWithinBounds(t *testing.T) {
	l := hostile(t, 1)
	_, _, start := l.NegotiationStart(1)
	_, goOn := l.NegotiationContinue(1, 2, []byte("hello"))
	_, extract := l.Extract(1, []byte("in"), []byte("tunnel"), []pkcs11.ObjectHandle{1, 2})
	_, policies := l.TokenPolicies(0)
	_, insert := l.SIMInsert(1, []byte("blob"))
	for what, err := range map[string]error{
		"starting a negotiation": start, "going on with it": goOn, "extracting": extract, "policies": policies, "SIM blobs of many": insert,
	} {
		if !errors.Is(err, pkcs11.Error(pkcs11.CKR_GENERAL_ERROR)) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if all, err := l.HSMPolicies(0); err != nil || len(all) != 1 || all[7] != 1 {
		t.Errorf("policies that grow: %v, %v", all, err)
	}
	for _, n := range []int{0, vendor.MaxObjects + 1} {
		if _, err := l.Extract(1, nil, nil, make([]pkcs11.ObjectHandle, n)); !errors.Is(err, pkcs11.Error(pkcs11.CKR_ARGUMENTS_BAD)) {
			t.Errorf("%d objects: %v", n, err)
		}
	}
	if _, err := l.ByUID(0, 1, []byte("short")); !errors.Is(err, pkcs11.Error(pkcs11.CKR_ARGUMENTS_BAD)) {
		t.Errorf("a short identity: %v", err)
	}
}

func TestMissingFunctionsAnswerThatTheyAre(t *testing.T) {
	l := hostile(t, 1)
	missing := l.Missing(vendor.Extract, vendor.Insert, vendor.SIMExtract)
	if fmt.Sprint(missing) != "[CA_Insert CA_SIMExtract]" || l.Has(vendor.Insert) || !l.Has(vendor.Extract) {
		t.Errorf("missing are %v", missing)
	}
	calls := map[string]error{
		"CA_RandomizeApplicationID":         l.RandomizeApplicationID(),
		"CA_SetApplicationID":               l.SetApplicationID(1, 2),
		"CA_MigrationCloseSession":          l.NegotiationClose(1, []byte("tunnel")),
		"CA_GetTokenStorageInformation":     second(l.TokenStorage(0)),
		"CA_GetContainerStorageInformation": second(l.ContainerStorage(0, 0)),
		"CA_GetContainerStatus":             second(l.Status(0, 0)),
		"CA_GetSessionInfo":                 second(l.Container(1)),
		"CA_GetObjectUID":                   second(l.UID(0, 1, 1)),
		"CA_GetObjectHandle":                second(l.ByUID(0, 1, make([]byte, vendor.UIDSize))),
		"CA_GetTokenCertificates":           second(l.Certificate(0, vendor.TWC3)),
		"CA_CloneAsSourceInit":              second(l.SourceInit(1)),
		"CA_CloneAsTargetInit":              second(l.TargetInit(1, nil, nil)),
		"CA_CloneAsSource":                  second(l.AsSource(1, 1, nil)),
		"CA_CloneAsTarget":                  second(l.AsTarget(1, nil, nil)),
		"CA_Insert":                         second(l.Insert(1, nil, nil, [][]byte{{1}})),
		"CA_SIMExtract":                     second(l.SIMExtract(1, 1)),
	}
	_, _, _, calls["CA_GetFirmwareVersion"] = l.Firmware(0)
	for name, err := range calls {
		if !errors.Is(err, pkcs11.Error(pkcs11.CKR_FUNCTION_NOT_SUPPORTED)) || !strings.Contains(err.Error(), name+", which the library does not have") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }
