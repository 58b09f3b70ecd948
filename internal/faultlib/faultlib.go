// Package faultlib answers: what if the PKCS#11 library itself misbehaves?
//
// [Build] makes a library that hands every call on to SoftHSM and, when a test says
// so, takes sessions and logins away, answers with failures, hangs, dawdles or hides
// objects, in the middle of the calls of whoever has loaded it. The faults live in a
// file, so they reach a driver in any process, and each is taken once however many
// processes there are.
package faultlib

import (
	_ "embed"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"kmsd/internal/softhsmtest"
)

//go:embed testdata/faultlib.c
var source []byte

// Header is fault.h, which every library that takes faults from a file includes.
//
//go:embed testdata/fault.h
var Header []byte

// Library is one library that misbehaves. Tests give it to a driver as the setting
// module.
type Library struct {
	Path string

	control *os.File
}

// What a fault does.
type What uint32

const (
	CloseSessions What = iota + 1 // C_CloseAllSessions on the slot, before the call
	Logout                        // C_Logout, before the call
	Answer                        // Arg is the answer; the call does not reach SoftHSM
	Hang                          // before the call, until Disarm
	Sleep                         // Arg milliseconds, before the call
	Empty                         // C_FindObjects finds nothing
	Occupy                        // Arg milliseconds, before the call; no other call of the process goes on meanwhile
)

// Fault is what happens to calls of one function.
type Fault struct {
	What     What
	Function string // "C_Encrypt"; "*" is any that takes a session
	After    uint32 // calls that pass before the first that it happens to
	Times    uint32 // calls that it happens to; 0 means 1
	Arg      uint32
}

// Forever is the number of times of a fault that lasts until it is disarmed.
const Forever = math.MaxUint32

// The layout of struct fault in faultlib.c.
const (
	slots      = 16
	slotSize   = 64
	leftAt     = 0
	afterAt    = 4
	whatAt     = 8
	argAt      = 12
	firedAt    = 16
	functionAt = 20
)

// built is what the compiler made, once in the life of the process.
var built struct {
	mu sync.Mutex // held while compiling: a second test would only wait for the same
	so []byte
}

func compile(t testing.TB) []byte {
	t.Helper()
	built.mu.Lock()
	defer built.mu.Unlock()
	if built.so != nil {
		return built.so
	}
	dir := t.TempDir()
	c := filepath.Join(dir, "faultlib.c")
	if err := os.WriteFile(c, source, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "fault.h"), Header, 0o600); err != nil {
		t.Fatal(err)
	}
	headers, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		t.Fatalf("looking for the PKCS#11 headers: %v", err)
	}
	out := filepath.Join(dir, "faultlib.so")
	cmd := exec.CommandContext(t.Context(), "gcc", "-shared", "-fPIC", "-fvisibility=hidden", "-O1", "-Wall", "-Wextra", "-Werror",
		"-I"+strings.TrimSpace(string(headers)), fmt.Sprintf("-DREAL=%q", softhsmtest.Module(t)), "-o", out, c, "-ldl", "-lpthread")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("compiling the library that misbehaves: %v\n%s", err, msg)
	}
	if built.so, err = os.ReadFile(out); err != nil {
		t.Fatal(err)
	}
	return built.so
}

// Build makes one library for each name, in a directory of the test's own.
func Build(t testing.TB, names ...string) []*Library {
	t.Helper()
	dir, so := t.TempDir(), compile(t)
	libs := make([]*Library, len(names))
	for i, name := range names {
		path := filepath.Join(dir, name+".so")
		if err := os.WriteFile(path, so, 0o700); err != nil {
			t.Fatal(err)
		}
		control, err := os.OpenFile(path+".ctl", os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { control.Close() })
		if err := control.Truncate(slots * slotSize); err != nil {
			t.Fatal(err)
		}
		libs[i] = &Library{Path: path, control: control}
	}
	return libs
}

// Arm puts a fault into a slot, in place of the one that was there.
func (l *Library) Arm(t testing.TB, slot int, f Fault) {
	t.Helper()
	if f.Times == 0 {
		f.Times = 1
	}
	if f.What == Hang {
		f.Arg = 1
	}
	l.write(t, slot, leftAt, 0)
	for _, field := range []struct {
		at    int64
		value uint32
	}{{afterAt, f.After}, {whatAt, uint32(f.What)}, {argAt, f.Arg}, {firedAt, 0}} {
		l.write(t, slot, field.at, field.value)
	}
	name := make([]byte, slotSize-functionAt)
	copy(name, f.Function)
	if _, err := l.control.WriteAt(name, int64(slot*slotSize+functionAt)); err != nil {
		t.Fatal(err)
	}
	l.write(t, slot, leftAt, f.Times)
}

// Disarm ends a fault, and the calls that hang by it go on.
func (l *Library) Disarm(t testing.TB, slot int) {
	t.Helper()
	l.write(t, slot, leftAt, 0)
	l.write(t, slot, argAt, 0)
}

// Fired is how often the fault of a slot has happened.
func (l *Library) Fired(t testing.TB, slot int) int { return int(l.read(t, slot, firedAt)) }

// Left is how often the fault of a slot will yet happen.
func (l *Library) Left(t testing.TB, slot int) int { return int(l.read(t, slot, leftAt)) }

func (l *Library) write(t testing.TB, slot int, at int64, value uint32) {
	t.Helper()
	if _, err := l.control.WriteAt(binary.NativeEndian.AppendUint32(nil, value), int64(slot*slotSize)+at); err != nil {
		t.Fatal(err)
	}
}

func (l *Library) read(t testing.TB, slot int, at int64) uint32 {
	t.Helper()
	b := make([]byte, 4)
	if _, err := l.control.ReadAt(b, int64(slot*slotSize)+at); err != nil {
		t.Fatal(err)
	}
	return binary.NativeEndian.Uint32(b)
}
