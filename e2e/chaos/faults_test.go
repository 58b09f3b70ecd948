package chaos_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"kmsd/e2e/chaos"
	"kmsd/internal/devserver"
	"kmsd/kms/api"
	"kmsd/pluginproto"
)

// carry has for each kind what hurts, waits, heals, and returns when what was hurt is
// whole again. They are called concurrently, never for one member twice at a time.
var carry = map[chaos.Kind]func(context.Context, *site, chaos.Step) error{
	chaos.KillDriver:      killDriver,
	chaos.FreezeDriver:    freezeDriver,
	chaos.CrashAtStart:    startFault("crash"),
	chaos.SlowStart:       slowStart,
	chaos.Garbage:         startFault("garbage"),
	chaos.WrongVersion:    startFault("version"),
	chaos.KillOthers:      killOthers,
	chaos.SessionsClosed:  libraryFault(closeSessions, 0),
	chaos.LoggedOut:       libraryFault(logout, 0),
	chaos.DeviceMemory:    libraryFault(answer, deviceMemory),
	chaos.DeviceError:     libraryFault(answer, pluginproto.CKRDeviceError),
	chaos.HungCall:        hungCall,
	chaos.TokenRemoved:    tokenRemoved,
	chaos.TokenReplaced:   tokenReplaced,
	chaos.ObjectDeleted:   objectDeleted,
	chaos.TokenDiskFull:   tokenDiskFull,
	chaos.CatalogDiskFull: catalogDiskFull,
	chaos.Drain:           drain,
	chaos.Standby:         standby,
	chaos.RemoveAdd:       removeAdd,
	chaos.Reload:          reload,
	chaos.KillDaemon:      func(ctx context.Context, s *site, _ chaos.Step) error { return s.restart(ctx) },
	chaos.ReloadRemove:    reloadRemove,
	chaos.FreezeDaemon:    func(ctx context.Context, s *site, step chaos.Step) error { return s.freeze(ctx, step.Hold) },
	chaos.LoseAll:         loseAll,
	chaos.Deactivated:     deactivated,
	chaos.PowerCycled:     powerCycled,
	chaos.Tampered:        tampered,
	chaos.SlowKeys:        keyFault(sleep, 0),
	chaos.AnswerLost:      keyFault(lose, pluginproto.CKRDeviceError),
}

const deviceMemory = 0x31 // CKR_DEVICE_MEMORY

// send sends a signal to the driver of a member that is whole, and returns its process
// ID.
func (s *site) send(ctx context.Context, h *hsm, sig syscall.Signal) (pid int, err error) {
	m, err := s.whole(ctx, h, 0)
	if err != nil {
		return 0, err
	}
	return m.DriverPID, h.signal(m.DriverPID, sig)
}

// signal sends a signal to a driver of the member; one that has ended needs none. The
// number may have gone to another process since.
func (h *hsm) signal(pid int, sig syscall.Signal) error {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !bytes.HasPrefix(line, []byte(h.driver+"\x00")) {
		return nil
	}
	if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("sending %v to process %d: %w", sig, pid, err)
	}
	return nil
}

func killDriver(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	pid, err := s.send(ctx, h, syscall.SIGKILL)
	if err != nil {
		return err
	}
	_, err = s.whole(ctx, h, pid)
	return err
}

func freezeDriver(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	pid, err := s.send(ctx, h, syscall.SIGSTOP)
	if err != nil {
		return err
	}
	pause(ctx, step.Hold)
	if err := h.signal(pid, syscall.SIGCONT); err != nil {
		return err
	}
	_, err = s.whole(ctx, h, 0)
	return err
}

// killOthers kills all drivers but one at the same moment.
func killOthers(ctx context.Context, s *site, step chaos.Step) error {
	pids := map[*hsm]int{}
	for _, i := range step.Hurts(len(s.hsms)) {
		m, err := s.whole(ctx, s.hsms[i], 0)
		if err != nil {
			return err
		}
		pids[s.hsms[i]] = m.DriverPID
	}
	for h, pid := range pids {
		if err := h.signal(pid, syscall.SIGKILL); err != nil {
			return err
		}
	}
	for h, pid := range pids {
		if _, err := s.whole(ctx, h, pid); err != nil {
			return err
		}
	}
	return nil
}

// loseAll kills every driver and lets none start for a while.
func loseAll(ctx context.Context, s *site, step chaos.Step) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.awaitLife(ctx)
	pids := map[*hsm]int{}
	for _, h := range s.hsms {
		m, err := s.whole(ctx, h, 0)
		if err != nil {
			return err
		}
		pids[h] = m.DriverPID
	}
	var errs []error
	for h, pid := range pids {
		errs = append(errs, h.order("crash"), h.signal(pid, syscall.SIGKILL))
	}
	pause(ctx, step.Hold)
	for h := range pids {
		errs = append(errs, h.order(""))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for h, pid := range pids {
		if _, err := s.whole(ctx, h, pid); err != nil {
			return err
		}
	}
	s.up = time.Now()
	return nil
}

// order tells the driver program of a member how to misbehave from its next start on;
// "" ends that.
func (h *hsm) order(fault string) error {
	// By renaming, so that a driver never reads half of it.
	path := h.driver + ".fault"
	if err := os.WriteFile(path+".new", []byte(fault), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// startFault has every new driver of a member misbehave for a while.
func startFault(fault string) func(context.Context, *site, chaos.Step) error {
	return func(ctx context.Context, s *site, step chaos.Step) error {
		h := s.hsms[step.Member]
		pid, err := s.sabotage(ctx, h, fault)
		if err == nil {
			pause(ctx, step.Hold)
		}
		if err := errors.Join(err, h.order("")); err != nil {
			return err
		}
		_, err = s.whole(ctx, h, pid)
		return err
	}
}

// sabotage kills the driver of a member that is whole and has new ones misbehave. It
// returns the process ID of the one that was killed. A kmsd that is killed meanwhile
// starts a new one too, so the order comes when nobody waits for the member any more.
func (s *site) sabotage(ctx context.Context, h *hsm, fault string) (pid int, err error) {
	m, err := s.whole(ctx, h, 0)
	if err != nil {
		return 0, err
	}
	return m.DriverPID, errors.Join(h.order(fault), h.signal(m.DriverPID, syscall.SIGKILL))
}

func slowStart(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	pid, err := s.sabotage(ctx, h, "slow "+step.Hold.String())
	if err == nil {
		_, err = s.whole(ctx, h, pid)
	}
	return errors.Join(err, h.order(""))
}

// firing is how long a fault of the library waits for the call that it is for. A
// member that has nothing to do makes no calls.
const firing = 2 * time.Second

func libraryFault(what what, answer uint) func(context.Context, *site, chaos.Step) error {
	return func(ctx context.Context, s *site, step chaos.Step) error {
		h := s.hsms[step.Member]
		h.token.arm(fault{what: what, function: step.Function, after: step.After, times: step.Times, arg: answer})
		defer h.token.disarm()
		soon, cancel := context.WithTimeout(ctx, firing)
		defer cancel()
		// Whether all of them come depends on what the member is asked for.
		_ = devserver.Poll(soon, func() error {
			if left := h.token.left(); left > 0 {
				return fmt.Errorf("%d are left", left)
			}
			return nil
		})
		h.token.disarm()
		_, err := s.whole(ctx, h, 0)
		return err
	}
}

func hungCall(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	h.token.arm(fault{what: hang, function: step.Function, after: step.After, times: 1})
	pause(ctx, step.Hold)
	h.token.disarm()
	_, err := s.whole(ctx, h, 0)
	return err
}

// tokenRemoved pulls the token out, and puts it back.
func tokenRemoved(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	back, err := h.token.remove(step.After)
	if err != nil {
		return err
	}
	pause(ctx, step.Hold)
	if err := devserver.Poll(ctx, back); err != nil {
		return err
	}
	_, err = s.whole(ctx, h, 0)
	return err
}

// objectDeleted destroys a key on a token behind the driver, and has an operator
// compare the members with the catalog.
func objectDeleted(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	// It may meet kmsd at work on the same token, which two programs should not do.
	if err := devserver.Poll(ctx, func() error { return s.deleteObject(ctx, h, step.After) }); err != nil {
		return err
	}
	pause(ctx, step.Hold)
	if err := s.admin(ctx, "group sync", func(a api.Admin) error {
		_, err := a.Sync(ctx, devserver.DefaultGroup, api.SyncOptions{})
		return err
	}); err != nil {
		return err
	}
	_, err := s.whole(ctx, h, 0)
	return err
}

// deleteObject destroys one of the keys on a token.
func (s *site) deleteObject(ctx context.Context, h *hsm, choice int) error {
	d, end, err := s.open(ctx, h)
	if err != nil {
		return err
	}
	defer end()
	objects, err := d.List(ctx)
	if err != nil || len(objects) == 0 {
		return err
	}
	slices.SortFunc(objects, func(a, b pluginproto.Object) int { return bytes.Compare(a.ID[:], b.ID[:]) })
	return d.Destroy(ctx, objects[choice%len(objects)].ID)
}

func tokenDiskFull(ctx context.Context, s *site, step chaos.Step) error {
	h := s.hsms[step.Member]
	free, err := h.token.fill()
	if err != nil {
		return err
	}
	healed := s.load.burst(ctx, step.Hold)
	if err := free(); err != nil {
		return err
	}
	healed()
	_, err = s.whole(ctx, h, 0)
	return err
}

func catalogDiskFull(ctx context.Context, s *site, step chaos.Step) error {
	s.filling.Lock() // two fillers would meet
	defer s.filling.Unlock()
	free, err := s.catalog.fill()
	if err != nil {
		return err
	}
	healed := s.load.burst(ctx, step.Hold)
	if err := free(); err != nil {
		return err
	}
	healed()
	return nil
}
