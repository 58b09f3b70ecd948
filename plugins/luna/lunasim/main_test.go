package lunasim_test

import (
	"fmt"
	"os"
	"testing"

	"github.com/miekg/pkcs11"

	"kmsd/plugins/luna/lunasim"
)

// child is the environment variable that makes the test program another process that
// uses a partition: the path of its library.
const child = "LUNASIM_TEST_CHILD"

func TestMain(m *testing.M) {
	if module := os.Getenv(child); module != "" {
		if err := useAsAnotherProcess(module); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// keysOfAChild is how many keys another process makes.
const keysOfAChild = 5

// useAsAnotherProcess logs in, makes keys, uses and destroys some.
func useAsAnotherProcess(module string) error {
	ctx := pkcs11.New(module)
	if ctx == nil {
		return fmt.Errorf("loading %s", module)
	}
	defer ctx.Destroy()
	if err := ctx.Initialize(); err != nil {
		return err
	}
	defer ctx.Finalize()
	h, err := ctx.OpenSession(firstLunaSlot, rwSession)
	if err != nil {
		return err
	}
	if err := ctx.Login(h, pkcs11.CKU_USER, lunasim.PIN); err != nil {
		return err
	}
	k := &token{Ctx: ctx, h: h}
	for i := range 2 * keysOfAChild {
		o, err := k.tryAES(fmt.Sprintf("%d-%d", os.Getpid(), i))
		if err != nil {
			return fmt.Errorf("making key %d: %w", i, err)
		}
		if err := k.seal(o, pkcs11.NewGCMParams(make([]byte, 12), nil, 128)); err != nil {
			return fmt.Errorf("using key %d: %w", i, err)
		}
		if i%2 == 0 {
			if err := ctx.DestroyObject(h, o); err != nil {
				return fmt.Errorf("destroying key %d: %w", i, err)
			}
		}
	}
	return nil
}
