// Package ca answers: how does a test call a vendor function of a PKCS#11 library?
//
// It is the tests' own and knows no rule: it finds a function by its name and hands
// words to it, so that hostile arguments can be given too. It works where the C calling
// convention passes every argument of these functions as a word, as Linux does on
// amd64 and arm64.
package ca

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>

typedef unsigned long w;
typedef w (*function)(w, w, w, w, w, w, w, w, w, w, w, w);

static w call(void *f, const w *a)
{
	return ((function)f)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
}
*/
import "C"

import (
	"fmt"
	"unsafe"
)

// maxArgs is the longest parameter list, CA_MigrationContinueSessionNegotiation's.
const maxArgs = 12

// Library is a library that is loaded. It is never unloaded.
type Library struct{ handle unsafe.Pointer }

// Open loads a library, or finds the one that is loaded from this path already.
func Open(path string) (*Library, error) {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	h := C.dlopen(name, C.RTLD_NOW|C.RTLD_LOCAL)
	if h == nil {
		return nil, fmt.Errorf("loading %s: %s", path, C.GoString(C.dlerror()))
	}
	return &Library{h}, nil
}

// Has reports whether the library has a function.
func (l *Library) Has(name string) bool { return l.find(name) != nil }

func (l *Library) find(name string) unsafe.Pointer {
	s := C.CString(name)
	defer C.free(unsafe.Pointer(s))
	return C.dlsym(l.handle, s)
}

// Memory is memory that C may keep pointers into while it is called.
type Memory struct{ blocks []unsafe.Pointer }

// Free gives all of it back.
func (m *Memory) Free() {
	for _, b := range m.blocks {
		C.free(b)
	}
	m.blocks = nil
}

// Bytes returns the address of n zeroed bytes that begin with b, and a view of them.
func (m *Memory) Bytes(b []byte, n int) (uint, []byte) {
	p := C.calloc(C.size_t(max(n, len(b), 1)), 1)
	m.blocks = append(m.blocks, p)
	view := unsafe.Slice((*byte)(p), max(n, len(b)))
	copy(view, b)
	return uint(uintptr(p)), view
}

// Words returns the address of some words, and a view of them.
func (m *Memory) Words(values ...uint) (uint, []uint) {
	p := C.calloc(C.size_t(max(len(values), 1)), C.size_t(unsafe.Sizeof(uint(0))))
	m.blocks = append(m.blocks, p)
	view := unsafe.Slice((*uint)(p), len(values))
	copy(view, values)
	return uint(uintptr(p)), view
}

// Call calls a function and returns its answer. An argument is an int or a uint, which
// is given as it is, bytes (nil is NULL), or a *uint, which C reads and writes.
func (l *Library) Call(name string, args ...any) uint {
	f := l.find(name)
	if f == nil || len(args) > maxArgs {
		panic(fmt.Sprintf("the library has no function %s with %d parameters", name, len(args)))
	}
	var m Memory
	defer m.Free()
	var words [maxArgs]C.w
	var after []func()
	for i, arg := range args {
		switch arg := arg.(type) {
		case int:
			words[i] = C.w(arg)
		case uint:
			words[i] = C.w(arg)
		case []byte:
			if arg == nil {
				continue
			}
			at, view := m.Bytes(arg, 0)
			words[i] = C.w(at)
			after = append(after, func() { copy(arg, view) })
		case *uint:
			at, view := m.Words(*arg)
			words[i] = C.w(at)
			after = append(after, func() { *arg = view[0] })
		default:
			panic(fmt.Sprintf("%s cannot be given a %T", name, arg))
		}
	}
	rv := uint(C.call(f, &words[0]))
	for _, back := range after {
		back()
	}
	return rv
}
