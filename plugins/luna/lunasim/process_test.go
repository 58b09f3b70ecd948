package lunasim_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
)

// another returns the command of another process that uses a partition.
func another(t testing.TB, p *lunasim.Partition) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), child+"="+p.Module, environment+"="+filepath.Dir(p.Conf))
	return cmd
}

func TestProcessesShareAPartition(t *testing.T) {
	k := start(t, lunasim.Options{})
	k.aes("mine")
	const processes = 3
	var wg sync.WaitGroup
	for i := range processes {
		wg.Go(func() {
			if out, err := another(t, k.p).CombinedOutput(); err != nil {
				t.Errorf("process %d: %v\n%s", i, err, out)
			}
		})
	}
	wg.Wait()
	found := k.find(attr(pkcs11.CKA_TOKEN, true))
	if want := 1 + processes*keysOfAChild; len(found) != want {
		t.Fatalf("there are %d keys, want %d", len(found), want)
	}
	ouids := map[string]bool{}
	for _, o := range found {
		ouids[k.ouid(o)] = true
	}
	if len(ouids) != len(found) {
		t.Errorf("%d keys have %d OUIDs", len(found), len(ouids))
	}
}

func TestSwitchesAndFaultsReachAnotherProcess(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{})
	slow := p.Arm(lunasim.Fault{What: lunasim.Sleep, Function: "C_GenerateKey", Arg: 1, Times: 3})
	// Each encryption is two calls: how long will it be, and do it.
	lost := p.Arm(lunasim.Fault{What: lunasim.Answer, Function: "C_Encrypt", After: 2, Arg: pkcs11.CKR_DEVICE_ERROR})
	out, err := another(t, p).CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("using key 1: pkcs11: 0x30")) {
		t.Errorf("%v: %s", err, out)
	}
	if lost.Fired() != 1 || lost.Left() != 0 || slow.Fired() != 2 || slow.Left() != 1 {
		t.Errorf("the faults happened %d and %d times", lost.Fired(), slow.Fired())
	}
	p.Set("activated", "no")
	if out, err := another(t, p).CombinedOutput(); err == nil || !bytes.Contains(out, []byte("0x80000020")) {
		t.Errorf("%v: %s", err, out)
	}
}

func TestThreadsShareALibrary(t *testing.T) {
	k := start(t, lunasim.Options{})
	key, other := k.aes("k"), start(t, lunasim.Options{})
	var sessions []pkcs11.SessionHandle
	for range 8 {
		sessions = append(sessions, k.session())
	}
	var wg sync.WaitGroup
	for i, h := range sessions {
		wg.Go(func() {
			mine := &token{Ctx: k.Ctx, h: h, t: t}
			for n := range 20 {
				var err error
				switch {
				case i == 0:
					var o pkcs11.ObjectHandle
					if o, err = mine.tryAES(fmt.Sprint("t", n)); err == nil {
						err = k.DestroyObject(h, o)
					}
				case i == 1:
					_, err = k.GetTokenInfo(firstLunaSlot)
				default:
					err = mine.seal(key, pkcs11.NewGCMParams(make([]byte, 12), nil, 128))
				}
				if err != nil {
					t.Errorf("thread %d: %v", i, err)
					return
				}
			}
		})
	}
	for i := range 3 {
		x := newCPv3(k, other, k.aes(fmt.Sprint("c", i)))
		wantCode(t, "a clone meanwhile", x.run(), 0)
	}
	wg.Wait()
}

// A generation may find its primes at once, and the machine may keep whoever looks on from
// looking, but not each time.
func TestNobodyWaitsForALongKeyGeneration(t *testing.T) {
	const rounds, generations = 20, 50
	k := start(t, lunasim.Options{})
	slow, other := k.session(), &token{Ctx: k.Ctx, h: k.session(), t: t}
	for range generations {
		made := make(chan error, 1)
		go func() {
			_, _, err := k.GenerateKeyPair(slow, mech(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil),
				[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_MODULUS_BITS, 2048), attr(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1})},
				[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_SIGN, true)})
			made <- err
		}()
		meanwhile := 0
		for ; len(made) == 0 && meanwhile < rounds; meanwhile++ {
			o := other.aes("k")
			if err := other.seal(o, pkcs11.NewGCMParams(make([]byte, 12), nil, 128)); err != nil {
				t.Error(err)
			}
			if err := k.DestroyObject(other.h, o); err != nil {
				t.Error(err)
			}
		}
		still := len(made) == 0
		if err := <-made; err != nil {
			t.Fatal(err)
		}
		if still {
			return
		}
	}
	t.Errorf("at none of %d generations were %d keys made, used and destroyed meanwhile", generations, rounds)
}

func TestPartitionsStartSideBySideInOneProcess(t *testing.T) {
	var tokens []*token
	for range 6 {
		tokens = append(tokens, load(t, lunasim.New(t, lunasim.Options{})))
	}
	var wg sync.WaitGroup
	for _, k := range tokens {
		wg.Go(func() {
			if err := k.Initialize(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, k := range tokens {
		info, err := k.GetTokenInfo(firstLunaSlot)
		if err != nil || info.SerialNumber != k.p.Serial {
			t.Errorf("the token is %q, %v; want %q", info.SerialNumber, err, k.p.Serial)
		}
		k.h = k.session()
		wantCode(t, "logging in", k.tryLogin(pkcs11.CKU_USER, k.p.PIN), 0)
		k.aes("k")
		if n := len(k.p.KeyBytes(t)); n != 1 {
			t.Errorf("partition %s has %d keys", k.p.Serial, n)
		}
		if err := k.Finalize(); err != nil {
			t.Error(err)
		}
	}
}

func TestWhatFaultsDo(t *testing.T) {
	generate := func(k *token) error { _, err := k.tryAES("k"); return err }
	for _, c := range []struct {
		name  string
		fault lunasim.Fault
		want  uint
		keys  int
		again uint // what the same call answers afterwards
	}{
		{"an answer in place of the call", lunasim.Fault{What: lunasim.Answer, Function: "C_GenerateKey", Arg: ckrStorageFull}, ckrStorageFull, 0, 0},
		{"an answer to any call", lunasim.Fault{What: lunasim.Answer, Function: "*", Arg: pkcs11.CKR_DEVICE_ERROR}, pkcs11.CKR_DEVICE_ERROR, 0, 0},
		{"a call whose answer is lost", lunasim.Fault{What: lunasim.Lose, Function: "C_GenerateKey", Arg: pkcs11.CKR_DEVICE_ERROR}, pkcs11.CKR_DEVICE_ERROR, 1, 0},
		{"sessions that end", lunasim.Fault{What: lunasim.CloseSessions, Function: "C_GenerateKey"}, pkcs11.CKR_SESSION_HANDLE_INVALID, 0, pkcs11.CKR_SESSION_HANDLE_INVALID},
		{"a login that ends", lunasim.Fault{What: lunasim.Logout, Function: "C_GenerateKey"}, pkcs11.CKR_USER_NOT_LOGGED_IN, 0, pkcs11.CKR_USER_NOT_LOGGED_IN},
	} {
		k := start(t, lunasim.Options{})
		armed := k.p.Arm(c.fault)
		wantCode(t, c.name, code(generate(k)), c.want)
		if got := len(k.p.KeyBytes(t)); got != c.keys || armed.Fired() != 1 {
			t.Errorf("%s: there are %d keys, and it happened %d times", c.name, got, armed.Fired())
		}
		wantCode(t, c.name+", afterwards", code(generate(k)), c.again)
	}
}

func TestACallThatHangsGoesOnWhenItIsLetTo(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{})
	k := load(t, p)
	hang := p.Arm(lunasim.Fault{What: lunasim.Hang, Function: "C_Initialize"})
	done := make(chan error, 1)
	go func() { done <- k.Initialize() }()
	for hang.Fired() == 0 {
		runtime.Gosched()
	}
	select {
	case err := <-done:
		t.Fatalf("it did not hang: %v", err)
	default:
	}
	hang.Disarm()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := k.Finalize(); err != nil {
		t.Fatal(err)
	}
}

func TestNothingIsSaidBeforeTheLibraryIsInitialised(t *testing.T) {
	k := load(t, lunasim.New(t, lunasim.Options{}))
	_, err := k.GetSlotList(true)
	wantCode(t, "listing the slots", code(err), pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)
	wantCode(t, "a session", code(k.CloseSession(1)), pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)
	var n uint
	wantCode(t, "a vendor function", k.ca.Call("CA_GetTokenPolicies", firstLunaSlot, []byte(nil), &n, []byte(nil), &n), pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)
}

// SoftHSM loses its token to a process that is killed while it logs in, and a Luna does not.
func TestAProcessThatIsKilledAtALoginCostsNothing(t *testing.T) {
	p := lunasim.New(t, lunasim.Options{})
	if out, err := another(t, p).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	files, err := filepath.Glob(filepath.Join(filepath.Dir(p.Conf), "tokens", "*", "token.object"))
	if err != nil || len(files) != 1 {
		t.Fatalf("the token's files: %v, %v", files, err)
	}
	if err := os.Truncate(files[0], 0); err != nil { // as it leaves it
		t.Fatal(err)
	}
	if found := login(t, p).find(attr(pkcs11.CKA_TOKEN, true)); len(found) != keysOfAChild {
		t.Errorf("there are %d keys, want %d", len(found), keysOfAChild)
	}
}
