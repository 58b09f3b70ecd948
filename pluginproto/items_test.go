package pluginproto_test

import (
	"strings"
	"testing"

	"kmsd/pluginproto"
)

func TestCommandsWithItemsAreChecked(t *testing.T) {
	items := func(n, input, aad int) []pluginproto.Item {
		all := make([]pluginproto.Item, n)
		for i := range all {
			all[i] = pluginproto.Item{Input: make([]byte, input), IV: make([]byte, pluginproto.GCMIVSize), AAD: make([]byte, aad)}
		}
		return all
	}
	command := func(op pluginproto.Op, mech pluginproto.Mechanism, all []pluginproto.Item) pluginproto.Command {
		return pluginproto.Command{Op: op, Mech: mech, Items: all}
	}
	const open, seal, gcm = pluginproto.OpDecrypt, pluginproto.OpEncrypt, pluginproto.AESGCM
	beside := command(seal, gcm, items(1, 32, 0))
	beside.Input = []byte("more")
	noIV := command(seal, gcm, items(2, 32, 0))
	noIV.Items[1].IV = nil
	longIV := func(op pluginproto.Op) pluginproto.Command {
		cmd := command(op, gcm, items(2, 48, 0))
		cmd.Items[1].IV = make([]byte, pluginproto.GCMLongIVSize)
		return cmd
	}
	for _, c := range []struct {
		name string
		cmd  pluginproto.Command
		says string // "": nothing is wrong
	}{
		{"as many as there may be", command(seal, gcm, items(pluginproto.MaxItems, 32, 64)), ""},
		{"items to decrypt", command(open, gcm, items(3, 48, 0)), ""},
		{"one too many", command(seal, gcm, items(pluginproto.MaxItems+1, 32, 0)), "257 items, at most 256"},
		{"too many bytes together", command(seal, gcm, items(2, pluginproto.MaxInput/2+1, 0)), "items of 1048578 bytes"},
		{"too much additional data together", command(seal, gcm, items(2, 32, pluginproto.MaxAAD/2+1)), "66562 of additional data"},
		{"an input beside them", beside, "an input beside the items"},
		{"an item without an IV", noIV, "IV of 0 bytes"},
		{"an item to decrypt with a long IV", longIV(open), ""},
		{"an item to encrypt with a long IV", longIV(seal), "IV of 16 bytes, AES-GCM takes 12"},
		{"an item shorter than its tag", command(open, gcm, items(1, 15, 0)), "shorter than its tag"},
		{"a MAC of many", command(pluginproto.OpMAC, pluginproto.HMAC, items(2, 32, 0)), "only AES-GCM takes many items"},
		{"random bytes of many", command(pluginproto.OpRandom, pluginproto.NoMechanism, items(2, 32, 0)), "only AES-GCM takes many items"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.cmd.Check()
			switch {
			case c.says == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.says != "" && (pluginproto.ClassOf(err) != pluginproto.ClassCaller || !strings.Contains(err.Error(), c.says)):
				t.Errorf("error %v, want one of the caller's that says %q", err, c.says)
			}
		})
	}
}
