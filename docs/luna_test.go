// Package docs_test answers: is what the documents say still true?
package docs_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"kmsd/pluginproto"
)

const (
	behaviours = 129
	weaknesses = 58
)

// What Thales' documents name, and luna.md therefore has to have a line for.
var (
	lunaCommands = []string{
		"hagroup creategroup", "hagroup addmember", "hagroup removemember", "hagroup addstandby", "hagroup removestandby",
		"hagroup deletegroup", "hagroup synchronize", "hagroup recover", "hagroup retry", "hagroup interval",
		"hagroup recoverymode", "hagroup haonly", "hagroup halog", "hagroup listgroups", "vtl haAdmin show",
		"partition changepw", "appid",
	}
	lunaEntries = []string{
		"VirtualToken.VirtualTokenNNLabel", "VirtualToken.VirtualTokenNNSN", "VirtualToken.VirtualTokenNNMembers",
		"VirtualToken.VirtualTokenNNStandbyMembers", "VirtualToken.VirtualTokenActiveRecovery", "HASynchronize.LABEL",
		"HAConfiguration.HAOnly", "HAConfiguration.haLogPath", "HAConfiguration.haLogStatus", "HAConfiguration.logLen",
		"HAConfiguration.haLogToStdout", "HAConfiguration.failover_on_deactivation", "HAConfiguration.reconnAtt",
		"HAConfiguration.AutoReconnectInterval", "HAConfiguration.statusTimeout", "HARecovery.LABEL",
		"LunaSA Client.ReceiveTimeout", "LunaSA Client.TCPKeepAlive", "LunaSA Client.ProbeTimeout",
		"Chrystoki2.LibUNIX64", "Misc.AppId", "ChrystokiConfigurationPath",
	}
	lunaLogLines = []string{
		"unable to reach member", "recovery attempt #n failed for member", "recovery attempt #n succeeded for member",
		"Member is revoked", "has been added", "has been removed",
	}
	lunaStatusWords = []string{
		"alive", "down", "------------", "Needs sync", "Synchronization", "CKR_OK", "CKR_DEVICE_ERROR", "CKR_TOKEN_NOT_PRESENT",
		"`isOK()` true", "`isOK()` false", "`isOK()` throws", "recovers", "attempts used up", "revoked", "promoted", "absent at the start",
	}
	lunaFunctions = []string{ // of the client library, that the driver may call
		"CA_GetTokenPolicies", "CA_GetTokenCapabilities", "CA_GetHSMPolicySet", "CA_GetHSMCapabilitySet", "CA_GetFirmwareVersion",
		"CA_GetSessionInfo", "CA_GetContainerStatus",
		"CA_GetContainerStorageInformation", "CA_GetTokenStorageInformation", "CA_GetObjectUID", "CA_GetObjectHandle",
		"CA_GetTokenObjectUID", "CA_GetTokenObjectHandle", "CA_RandomizeApplicationID", "CA_SetApplicationID",
		"CA_CloneAsSourceInit", "CA_CloneAsTargetInit", "CA_CloneAsSource", "CA_CloneAsTarget", "CA_GetTokenCertificates",
		"CA_GenerateCloningKEV", "CA_MigrationStartSessionNegotiation", "CA_MigrationContinueSessionNegotiation",
		"CA_MigrationCloseSession", "CA_Extract", "CA_Insert", "CA_SIMExtract", "CA_SIMInsert",
	}
)

// lunaValue is a return value that Thales' documents and headers name for HA and cloning.
type lunaValue struct {
	name  string
	value uint
	guess bool // no document says when it comes
}

var lunaValues = []lunaValue{
	{"CKR_OK", 0x00, false}, {"CKR_DEVICE_ERROR", 0x30, false}, {"CKR_TOKEN_NOT_PRESENT", 0xE0, false},
	{"CKR_SESSION_HANDLE_INVALID", 0xB3, false}, {"CKR_DEVICE_REMOVED", 0x32, true}, {"CKR_DEVICE_MEMORY", 0x31, true},
	{"CKR_CRYPTOKI_NOT_INITIALIZED", 0x190, false}, {"CKR_CRYPTOKI_ALREADY_INITIALIZED", 0x191, true},
	{"CKR_OBJECT_HANDLE_INVALID", 0x82, true}, {"CKR_KEY_HANDLE_INVALID", 0x60, true},
	{"CKR_USER_NOT_LOGGED_IN", 0x101, true}, {"CKR_USER_ALREADY_LOGGED_IN", 0x100, true}, {"CKR_DATA_LEN_RANGE", 0x21, true},
	{"CKR_DATA_INVALID", 0x20, true}, {"CKR_ENCRYPTED_DATA_INVALID", 0x40, true},
	{"CKR_PIN_EXPIRED", 0xA3, false}, {"CKR_PIN_INCORRECT", 0xA0, false}, {"CKR_PIN_LOCKED", 0xA4, false},
	{"CKR_ATTRIBUTE_VALUE_INVALID", 0x13, false},
	{"CKR_CLONING_PARAMETER_ALREADY_EXISTS", 0x80000008, false}, {"CKR_CLONING_PARAMETER_MISSING", 0x80000009, true},
	{"CKR_SIM_AUTHORIZATION_FAILED", 0x80000017, false}, {"CKR_SIM_VERSION_UNSUPPORTED", 0x80000018, false},
	{"CKR_SIM_CORRUPT_DATA", 0x80000019, false}, {"CKR_USER_NOT_AUTHORIZED", 0x8000001A, false},
	{"CKR_SIM_AUTHFORM_INVALID", 0x8000001D, false}, {"CKR_UNABLE_TO_CONNECT", 0x8000001F, true},
	{"CKR_PARTITION_DISABLED", 0x80000020, true}, {"CKR_TIMEOUT", 0x80000024, true}, {"CKR_HSM_STORAGE_FULL", 0x8000002A, true},
	{"CKR_DEVICE_TIMEOUT", 0x8000002B, true}, {"CKR_CONTAINER_OBJECT_STORAGE_FULL", 0x8000002C, true},
	{"CKR_OPERATION_NOT_ALLOWED", 0x80000030, true}, {"CKR_AGAIN", 0x80000041, true}, {"CKR_ACCESS_ID_INVALID", 0x80000068, false},
	{"CKR_ACCESS_ID_ALREADY_EXISTS", 0x80000069, false}, {"CKR_OBJECT_ALREADY_EXISTS", 0x8000006F, true},
	{"CKR_HSM_TAMPERED", 0x80000076, false}, {"CKR_SMK_ID_NOT_FOUND", 0x80000099, false}, {"CKR_ACCESS_ID_CONFLICT", 0x8000009F, false},
	{"CKR_KEY_INVALID_FOR_HA_LOGIN", 0x80000100, false}, {"CKR_FAILED_TO_CLONE_AN_OBJECT", 0x80000106, false},
	{"CKR_CLONE_NOT_ATTEMPTED", 0x80000107, true}, {"CKR_SESSION_NEGOTIATION_NO_PSK", 0x80000108, false},
	{"CKR_SESSION_NEGOTIATION_NO_ROOTS", 0x80000109, false}, {"CKR_SESSION_NEGOTIATION_NO_ALGS", 0x8000010A, false},
	{"CKR_SESSION_NEGOTIATION_EXPIRED", 0x8000010B, false}, {"CKR_SESSION_NEGOTIATION_INVALID", 0x8000010C, false},
	{"CKR_SESSION_ID_INVALID", 0x8000010D, false}, {"CKR_SESSION_ID_EXISTS", 0x8000010E, false},
	{"CKR_SESSION_ID_EXPIRED", 0x8000010F, false}, {"CKR_ATTESTATION_EXPIRED", 0x80000110, false},
	{"CKR_PROTOCOL_DISABLED", 0x80000111, false}, {"CKR_OBJECT_TYPE_INVALID", 0x80000112, false},
	{"CKR_OBJECT_READ_ONLY", 0x80000114, false}, {"CKR_SESSION_NEGOTIATION_NO_SESSION_DURATION", 0x80000116, false},
	{"CKR_SESSION_NEGOTIATION_NO_KDF", 0x80000118, false}, {"CKR_SESSION_NEGOTIATION_NO_ENCODING", 0x80000119, false},
	{"CKR_SESSION_NEGOTIATION_NO_CHAIN_ATT", 0x8000011A, false}, {"CKR_SESSION_NEGOTIATION_NO_EPHEMERAL_KEY", 0x8000011B, false},
	{"CKR_KEY_NOT_ACTIVE", 0x80000136, false}, {"LUNA_RET_HA_NOT_SUPPORTED", 0x80000900, false},
	{"LUNA_RET_HA_USER_NOT_INITIALIZED", 0x80000901, false}, {"CKR_BUSY", 0x80001604, true},
	{"LUNA_RET_OPERATION_RESTRICTED", 0x10A0B, false},
}

var (
	namePattern  = regexp.MustCompile("`(Test[A-Za-z0-9_]+)`")
	testPattern  = regexp.MustCompile(`^func (Test[A-Za-z0-9_]+)\(t \*testing\.T\)`)
	proofPattern = regexp.MustCompile("^(soft|sim|doc|guess|n/a)(: `Test[A-Za-z0-9_]+`(<br>`Test[A-Za-z0-9_]+`)*)?$")
)

// row is a line of a table.
type row struct {
	section string // the heading above
	cells   []string
	proof   bool // the table has a last column with that title
}

func (r row) String() string { return r.section + ": " + r.cells[0] }

// tables returns the lines of all tables of a document, without their heads.
func tables(t *testing.T, path string) []row {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var rows []row
	var section string
	var head []string // of the table that the line is in
	lines := strings.Split(string(text), "\n")
	for i, line := range lines {
		if heading := strings.TrimLeft(line, "#"); heading != line {
			section = strings.TrimSpace(heading)
		}
		if !strings.HasPrefix(line, "|") {
			head = nil
			continue
		}
		cells := strings.Split(strings.Trim(line, "| "), " | ")
		switch {
		case head == nil && i+1 < len(lines) && strings.HasPrefix(lines[i+1], "|-"):
			head = strings.Split(strings.Trim(line, "|"), " | ")
		case strings.HasPrefix(line, "|-"):
		case len(cells) > len(head):
			t.Errorf("%s has %d cells under %d titles", cells[0], len(cells), len(head))
		default:
			rows = append(rows, row{section, cells, strings.TrimSpace(head[len(head)-1]) == "proof"})
		}
	}
	return rows
}

func section(rows []row, name string) []row {
	return slices.DeleteFunc(slices.Clone(rows), func(r row) bool { return r.section != name })
}

// Every behaviour and weakness is there once, and says why where there is nothing to show.
func TestLunaTableIsWhole(t *testing.T) {
	shown := map[string]bool{}
	numbers := regexp.MustCompile(`^(W?\d+)( \[old\])?$`)
	for _, r := range tables(t, "luna.md") {
		m := numbers.FindStringSubmatch(r.cells[0])
		if m == nil {
			continue
		}
		if shown[m[1]] {
			t.Errorf("%s stands there twice", m[1])
		}
		shown[m[1]] = true
		here, proof := r.cells[len(r.cells)-2], r.cells[len(r.cells)-1]
		if reasoned := strings.HasPrefix(here, "Does not apply") || strings.HasPrefix(here, "Nothing to show"); proof == "n/a" && !reasoned {
			t.Errorf("%s names no test and no reason", m[1])
		}
	}
	for n := 1; n <= behaviours; n++ {
		if !shown[fmt.Sprint(n)] {
			t.Errorf("behaviour %d is missing", n)
		}
	}
	for n := 1; n <= weaknesses; n++ {
		if !shown[fmt.Sprintf("W%d", n)] {
			t.Errorf("weakness W%d is missing", n)
		}
	}
}

// Every line says what it rests on. What was shown on the simulator names a test that
// has it, and what was shown elsewhere one that does not need it.
func TestEveryLineAboutLunaSaysWhatItRestsOn(t *testing.T) {
	exists := testsOf(t, "..")
	for _, r := range tables(t, "luna.md") {
		if !r.proof {
			if r.section != "kmsd and Thales Luna" { // the meaning of the marks
				t.Errorf("%s is in a table without proof", r)
			}
			continue
		}
		proof := r.cells[len(r.cells)-1]
		m := proofPattern.FindStringSubmatch(proof)
		if m == nil {
			t.Errorf("%s rests on %q", r, proof)
			continue
		}
		var with, without bool // tests with the driver on the simulator, and others
		for _, name := range namePattern.FindAllStringSubmatch(proof, -1) {
			for _, path := range exists[name[1]] {
				with = with || strings.Contains(path, "luna") && !strings.Contains(path, "lunasim/")
				without = without || !strings.Contains(path, "luna")
			}
		}
		if m[1] == "sim" && !with || m[1] == "soft" && !without {
			t.Errorf("%s is marked %s and names no such test", r, m[1])
		}
	}
}

func TestEveryThingOfLunaHasItsLine(t *testing.T) {
	rows := tables(t, "luna.md")
	for _, tc := range []struct {
		section string
		column  int
		names   []string
		quoted  bool
	}{
		{"Commands", 0, lunaCommands, true},
		{"Chrystoki.conf", 0, lunaEntries, true},
		{"Log lines", 0, lunaLogLines, false},
		{"Status words", 0, lunaStatusWords, false},
		{"What the driver needs of the client library", 0, lunaFunctions, true},
	} {
		t.Run(tc.section, func(t *testing.T) {
			for _, name := range tc.names {
				if tc.quoted {
					name = "`" + name + "`"
				}
				if n := len(slices.DeleteFunc(section(rows, tc.section), func(r row) bool {
					return !strings.Contains(r.cells[tc.column], name)
				})); n == 0 {
					t.Errorf("%s has no line", name)
				}
			}
		})
	}
}

// Every return value has its line, with its number, and says so when nobody wrote down
// when it comes.
func TestEveryReturnValueOfLunaHasItsLine(t *testing.T) {
	rows := section(tables(t, "luna.md"), "Return values")
	for _, v := range lunaValues {
		number := fmt.Sprintf("0x%02X", v.value)
		at := slices.IndexFunc(rows, func(r row) bool { return slices.Contains(strings.Split(r.cells[0], "<br>"), "`"+v.name+"` "+number) })
		if at < 0 {
			t.Errorf("%s %s has no line", v.name, number)
			continue
		}
		if v.guess && !strings.Contains(rows[at].cells[1], "(guess)") {
			t.Errorf("%s does not say that its meaning is a guess", v.name)
		}
		if name := pluginproto.CKRName(v.value); !strings.Contains(name, "0x") && name != v.name {
			t.Errorf("%s is %s in status and log", number, name)
		}
	}
}

// Every function of Thales that the driver looks for is in luna.md, and the other way round.
func TestTheFunctionsOfTheClientLibraryAreListed(t *testing.T) {
	var called []string
	for _, m := range regexp.MustCompile(`"(CA_[A-Za-z0-9]+)"`).FindAllStringSubmatch(sources(t, "../plugins/luna/internal/vendor/*.go"), -1) {
		called = append(called, m[1])
		if !slices.Contains(lunaFunctions, m[1]) {
			t.Errorf("%s is not in the list", m[1])
		}
	}
	for _, name := range lunaFunctions {
		if !slices.Contains(called, name) {
			t.Errorf("%s is looked for nowhere", name)
		}
	}
}

// The classes are those of the driver's table.
func TestTheClassesOfLunasReturnValuesAreTheDrivers(t *testing.T) {
	text := sources(t, "../plugins/luna/codes.go")
	numbers := map[string]string{} // :: constant → "own + 0x30"
	for _, m := range regexp.MustCompile(`(?m)^\t(ckr[A-Za-z]+)\s+= (own \+ 0x[0-9A-F]+)$`).FindAllStringSubmatch(text, -1) {
		numbers[m[1]] = m[2]
	}
	classes := map[string]string{} // :: value → class, as luna.md says it
	for _, m := range regexp.MustCompile(`(?m)^\t(own \+ 0x[0-9A-F]+|0x[0-9A-F]+|ckr[A-Za-z]+):\s+\{Class: pluginproto\.Class([A-Za-z]+)(.*)$`).FindAllStringSubmatch(text, -1) {
		key, class := m[1], strings.ToLower(m[2])
		if number, is := numbers[key]; is {
			key = number
		}
		if strings.Contains(m[3], "Permanent: true") {
			class += ", for good"
		}
		classes[key] = class
	}
	rows := section(tables(t, "luna.md"), "Return values")
	for _, v := range lunaValues {
		key := fmt.Sprintf("0x%X", v.value)
		if v.value >= 1<<31 {
			key = fmt.Sprintf("own + 0x%02X", v.value-1<<31)
		}
		want, is := classes[key]
		if !is && v.value >= 1<<31 {
			t.Errorf("the driver has no class for %s", v.name)
		}
		delete(classes, key)
		at := slices.IndexFunc(rows, func(r row) bool { return strings.Contains(r.cells[0], "`"+v.name+"`") })
		if is && at >= 0 && rows[at].cells[2] != want {
			t.Errorf("%s is %q, the driver says %q", v.name, rows[at].cells[2], want)
		}
	}
	for value := range classes {
		t.Errorf("the driver's %s has no line", value)
	}
}

// sources returns the text of all files of a pattern, without tests.
func sources(t *testing.T, pattern string) string {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, path := range paths {
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(path, "_test.go") {
			all.Write(source)
		}
	}
	return all.String()
}

// Every test that a document names exists.
func TestNamedTestsExist(t *testing.T) {
	exists := testsOf(t, "..")
	docs, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range docs {
		doc, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range namePattern.FindAllStringSubmatch(string(doc), -1) {
			if exists[m[1]] == nil {
				t.Errorf("%s names %s, which does not exist", path, m[1])
			}
		}
	}
}

// testsOf returns the tests below root, and the files that have one of that name.
func testsOf(t *testing.T, root string) map[string][]string {
	t.Helper()
	exists := map[string][]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && path != root && strings.HasPrefix(d.Name(), ".") {
			return fs.SkipDir // what git keeps comes and goes
		}
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for line := range strings.Lines(string(source)) {
			if !strings.HasPrefix(line, "func Test") {
				continue
			}
			if m := testPattern.FindStringSubmatch(line); m != nil {
				exists[m[1]] = append(exists[m[1]], path)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return exists
}
