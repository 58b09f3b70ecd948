package pluginproto_test

import (
	"context"
	"strings"
	"testing"

	"kmsd/internal/drivertest"
	"kmsd/internal/memdriver"
	"kmsd/pluginproto"
)

// liar is a driver whose answers are not answers to what it was asked.
type liar struct {
	pluginproto.Driver
	object pluginproto.Object
	list   []pluginproto.Object
	reply  pluginproto.CloneReply
	result pluginproto.Result
}

func (l liar) Inspect(context.Context, pluginproto.KeyID) (pluginproto.Object, error) {
	return l.object, nil
}

func (l liar) Generate(context.Context, pluginproto.KeySpec) (pluginproto.Object, error) {
	return l.object, nil
}

func (l liar) List(context.Context) ([]pluginproto.Object, error) { return l.list, nil }

func (l liar) CloneStep(context.Context, pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	return l.reply, nil
}

func (l liar) Do(context.Context, pluginproto.Command) (pluginproto.Result, error) {
	return l.result, nil
}

func TestBadRepliesAreTheMembersFault(t *testing.T) {
	id := pluginproto.KeyID{1}
	good := pluginproto.Object{ID: id, Type: pluginproto.AES256, CheckValue: make([]byte, 8)}
	changed := func(change func(*pluginproto.Object)) pluginproto.Object {
		o := good
		change(&o)
		return o
	}
	inspect := func(ctx context.Context, d pluginproto.Driver) error { _, err := d.Inspect(ctx, id); return err }
	generate := func(ctx context.Context, d pluginproto.Driver) error {
		_, err := d.Generate(ctx, pluginproto.KeySpec{ID: id, Type: pluginproto.AES256})
		return err
	}
	list := func(ctx context.Context, d pluginproto.Driver) error { _, err := d.List(ctx); return err }
	clone := func(ctx context.Context, d pluginproto.Driver) error {
		_, err := d.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneTarget, Protocol: "memory", Keys: []pluginproto.KeyID{id}})
		return err
	}
	prove := func(ctx context.Context, d pluginproto.Driver) error {
		_, err := d.CloneStep(ctx, pluginproto.CloneRequest{Role: pluginproto.CloneTarget, Protocol: "memory", Keys: []pluginproto.KeyID{id}, Prove: true})
		return err
	}
	run := func(cmd pluginproto.Command) func(context.Context, pluginproto.Driver) error {
		return func(ctx context.Context, d pluginproto.Driver) error { return do(ctx, d, cmd) }
	}
	encrypt := pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: id, Input: make([]byte, 32), IV: make([]byte, 12)}
	decrypt := encrypt
	decrypt.Op = pluginproto.OpDecrypt
	chosen := encrypt
	chosen.IV = []byte("chosen by me")
	many := pluginproto.Command{Op: pluginproto.OpEncrypt, Mech: pluginproto.AESGCM, Key: id, Items: []pluginproto.Item{
		{Input: make([]byte, 32), IV: chosen.IV}, {Input: make([]byte, 32), IV: []byte("and this too")},
	}}
	own := pluginproto.ItemResult{Output: make([]byte, 48), IV: []byte("the token's own!")}
	mac := pluginproto.Command{Op: pluginproto.OpMAC, Mech: pluginproto.HMAC, Key: id}

	for _, tc := range []struct {
		name string
		liar liar
		ask  func(context.Context, pluginproto.Driver) error
		text string
	}{
		{"another key", liar{object: changed(func(o *pluginproto.Object) { o.ID = pluginproto.KeyID{2} })}, inspect, "asked for key 01"},
		{"a key without check value", liar{object: changed(func(o *pluginproto.Object) { o.CheckValue = nil })}, inspect, "check value of 0 bytes"},
		{"a key of a type from elsewhere", liar{object: changed(func(o *pluginproto.Object) { o.Type = "rot-13" })}, inspect, `type "rot-13"`},
		{"a pair without public half", liar{object: changed(func(o *pluginproto.Object) { o.Type = pluginproto.RSA2048 })}, inspect, "public half of 0 bytes"},
		{"a new key of another type", liar{object: changed(func(o *pluginproto.Object) { o.Type = pluginproto.AES128 })}, generate, "asked for a key of type aes-256, got aes-128"},
		{"one key twice in a list", liar{list: []pluginproto.Object{good, good}}, list, "listed twice"},
		{"a clone that is done and shows nothing", liar{reply: pluginproto.CloneReply{Done: true}}, clone, "answers for 0 keys to a transfer of 1"},
		{"a clone that shows an empty answer", liar{reply: pluginproto.CloneReply{Done: true, Keys: make([]pluginproto.CloneResult, 1)}}, clone, "no object"},
		{"a clone that shows too much", liar{reply: pluginproto.CloneReply{Done: true, Keys: make([]pluginproto.CloneResult, 2)}}, clone, "answers for 2 keys to a transfer of 1"},
		{"a clone of another key", liar{reply: pluginproto.CloneReply{Done: true, Keys: []pluginproto.CloneResult{{Object: &pluginproto.Object{Type: pluginproto.AES256, CheckValue: []byte{1}}}}}}, clone, "asked for key 01"},
		{"a proof that is not done", liar{reply: pluginproto.CloneReply{Blob: []byte{1}}}, prove, "proved in one step"},
		{"a ciphertext as long as the plaintext", liar{result: pluginproto.Result{Output: make([]byte, 32), IV: make([]byte, 12)}}, run(encrypt), "encrypting gave 32 bytes"},
		{"a ciphertext without IV", liar{result: pluginproto.Result{Output: make([]byte, 48)}}, run(encrypt), "IV of 0"},
		{"a ciphertext with an IV of no known size", liar{result: pluginproto.Result{Output: make([]byte, 48), IV: make([]byte, 13)}}, run(encrypt), "IV of 13"},
		{"a ciphertext with an IV that is too long", liar{result: pluginproto.Result{Output: make([]byte, 48), IV: make([]byte, 17)}}, run(encrypt), "IV of 17"},
		{"a ciphertext under an IV of zeros", liar{result: pluginproto.Result{Output: make([]byte, 48), IV: make([]byte, 16)}}, run(chosen), "an IV of zeros"},
		{"two ciphertexts under one IV", liar{result: pluginproto.Result{Items: []pluginproto.ItemResult{own, own}}}, run(many), "one IV of its own twice"},
		{"a plaintext that is too long", liar{result: pluginproto.Result{Output: make([]byte, 32)}}, run(decrypt), "decrypting gave 32 bytes"},
		{"a plaintext under another IV", liar{result: pluginproto.Result{Output: make([]byte, 16), IV: []byte("another one!")}}, run(decrypt), "another IV"},
		{"a short MAC", liar{result: pluginproto.Result{Output: make([]byte, 8)}}, run(mac), "gave 8 bytes"},
		{"too few random bytes", liar{result: pluginproto.Result{Output: make([]byte, 15)}}, run(random), "gave 15 bytes"},
		{"a probe that says something", liar{result: pluginproto.Result{Output: []byte("ok")}}, run(probe), "gave 2 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.liar.Driver = memdriver.New(memdriver.Options{})
			wall := drivertest.NewWall(t, tc.liar, pluginproto.ServerOptions{}, pluginproto.ClientOptions{})
			if _, err := wall.Open(t.Context(), openRequest()); err != nil {
				t.Fatal(err)
			}
			err := tc.ask(t.Context(), wall)
			if pluginproto.ClassOf(err) != pluginproto.ClassMember || !strings.Contains(err.Error(), tc.text) {
				t.Errorf("error %v, want one of class member that says %q", err, tc.text)
			}
		})
	}
}
