package pluginproto

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/proto"

	driverv1 "kmsd/pluginproto/v1"
)

// FuzzCommands reads foreign bytes as the driver's side does. What comes through is
// within the contract.
func FuzzCommands(f *testing.F) {
	for _, m := range []*driverv1.Command{
		{Id: 1, Op: driverv1.Op_OP_PROBE},
		{Id: 2, Op: driverv1.Op_OP_RANDOM, Length: 32, TimeoutUs: -1},
		{Id: 3, Op: driverv1.Op_OP_ENCRYPT, Key: make([]byte, 16), Mechanism: driverv1.Mechanism_MECHANISM_AES_GCM, Iv: make([]byte, 12)},
		{Id: 3, Op: driverv1.Op_OP_DECRYPT, Key: make([]byte, 16), Mechanism: driverv1.Mechanism_MECHANISM_AES_GCM, Input: make([]byte, 48), Iv: make([]byte, 16)},
		{Id: 4, Op: driverv1.Op_OP_DECRYPT, Key: make([]byte, 15), Mechanism: driverv1.Mechanism_MECHANISM_AES_GCM, TimeoutUs: 1 << 62},
		{Id: 5, Op: -1, Mechanism: 1 << 30, Hash: -7, Length: 1 << 31},
		{Id: 6, Op: driverv1.Op_OP_SIGN, Key: make([]byte, 16), Mechanism: driverv1.Mechanism_MECHANISM_ECDSA, Hash: driverv1.Hash_HASH_SHA256, Input: make([]byte, 31)},
		{Id: 7, Op: driverv1.Op_OP_DECRYPT, Key: make([]byte, 16), Mechanism: driverv1.Mechanism_MECHANISM_AES_GCM, Items: []*driverv1.Item{{Input: make([]byte, 48), Iv: make([]byte, 12)}, {}}},
	} {
		b, err := proto.Marshal(&driverv1.CommandBatch{Commands: []*driverv1.Command{m}, Cancelled: []uint64{m.GetId()}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var batch driverv1.CommandBatch
		if proto.Unmarshal(b, &batch) != nil {
			return
		}
		for _, m := range batch.GetCommands() {
			if left, ok := timeoutOf(m); left < 0 || !ok && left != 0 {
				t.Errorf("timeout %v, %v", left, ok)
			}
			cmd, err := commandOf(m)
			if err != nil {
				if ClassOf(err) != ClassCaller {
					t.Errorf("error %v is not of class caller", err)
				}
				continue
			}
			if len(cmd.Input) > MaxInput || len(cmd.AAD) > MaxAAD || cmd.Length > 0 && cmd.Op == OpRandom && cmd.Length > MaxRandom {
				t.Errorf("a command over the limits: %+v", cmd)
			}
			if cmd.Mech == AESGCM && len(cmd.Items) == 0 && !ivFits(cmd.Op, cmd.IV) {
				t.Errorf("an IV of %d bytes", len(cmd.IV))
			}
			input, aad := 0, 0
			for _, it := range cmd.Items {
				input, aad = input+len(it.Input), aad+len(it.AAD)
				if !ivFits(cmd.Op, it.IV) {
					t.Errorf("an item with an IV of %d bytes", len(it.IV))
				}
			}
			if len(cmd.Items) > MaxItems || input > MaxInput || aad > MaxAAD {
				t.Errorf("%d items of %d and %d bytes", len(cmd.Items), input, aad)
			}
		}
	})
}

// ivFits reports whether an IV is one that the contract has for an operation.
func ivFits(op Op, iv []byte) bool {
	return len(iv) == GCMIVSize || op == OpDecrypt && len(iv) == GCMLongIVSize
}

// FuzzResults reads foreign bytes as the core's side does. What comes through is an
// answer to what was asked.
func FuzzResults(f *testing.F) {
	asked := []question{
		{op: OpEncrypt, mech: AESGCM, input: 32},
		{op: OpDecrypt, mech: AESGCM, input: 48},
		{op: OpDecrypt, mech: RSAOAEP, input: 256},
		{op: OpSign, mech: ECDSA, input: 32},
		{op: OpVerify, mech: ECDSA, input: 32},
		{op: OpMAC, mech: HMAC, input: 5},
		{op: OpRandom, length: 16},
		{op: OpProbe},
		{op: OpEncrypt, mech: AESGCM, items: []question{{op: OpEncrypt, mech: AESGCM, input: 32}, {op: OpEncrypt, mech: AESGCM, input: 1}}},
		{op: OpDecrypt, mech: AESGCM, items: []question{{op: OpDecrypt, mech: AESGCM, input: 48}, {op: OpDecrypt, mech: AESGCM, input: 17}}},
	}
	for _, m := range []*driverv1.Result{
		{Id: 1},
		{Id: 1, Output: make([]byte, 48), Iv: make([]byte, 12)},
		{Id: 1, Output: make([]byte, 32), Iv: bytes.Repeat([]byte{1}, 12)},
		{Id: 1, Output: make([]byte, 48), Iv: bytes.Repeat([]byte{1}, 16)},
		{Id: 1, Items: []*driverv1.ItemResult{{Output: make([]byte, 48), Iv: bytes.Repeat([]byte{1}, 16)}, {Output: make([]byte, 17), Iv: bytes.Repeat([]byte{1}, 16)}}},
		{Id: 1, Output: make([]byte, 16)},
		{Id: 1, Failure: &driverv1.Failure{Class: driverv1.Class_CLASS_EXPIRED}},
		{Id: 1, Failure: &driverv1.Failure{Class: -3, Ckr: 1 << 63, Permanent: true}},
		{Id: 1, Items: []*driverv1.ItemResult{{Output: make([]byte, 32)}, {Failure: &driverv1.Failure{Class: driverv1.Class_CLASS_CALLER}}}},
		{Id: 1, Items: []*driverv1.ItemResult{{Output: make([]byte, 32)}, {Failure: &driverv1.Failure{Class: driverv1.Class_CLASS_MEMBER}}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		for i := range asked {
			f.Add(b, uint8(i))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, which uint8) {
		var m driverv1.Result
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		q := asked[int(which)%len(asked)]
		r, err := resultOf(&q, &m)
		if err != nil {
			if len(r.Output) != 0 || len(r.IV) != 0 {
				t.Error("a result beside an error")
			}
			return
		}
		if len(r.Items) != len(q.items) {
			t.Errorf("%d answers to %d items", len(r.Items), len(q.items))
		}
		for i, it := range r.Items {
			want := q.items[i].input - GCMTagSize
			if q.op == OpEncrypt {
				want = q.items[i].input + GCMTagSize
			}
			if it.Err == nil && len(it.Output) != want || it.Err != nil && ClassOf(it.Err) != ClassCaller {
				t.Errorf("item %d: %d bytes, %v", i, len(it.Output), it.Err)
			}
		}
		if q.items != nil {
			return
		}
		switch q.op {
		case OpEncrypt:
			if len(r.Output) != q.input+GCMTagSize || !GCMIV(len(r.IV)) {
				t.Errorf("ciphertext of %d bytes, IV of %d", len(r.Output), len(r.IV))
			}
		case OpRandom:
			if len(r.Output) != q.length {
				t.Errorf("%d random bytes", len(r.Output))
			}
		case OpVerify, OpProbe:
			if len(r.Output) != 0 {
				t.Errorf("%d bytes of nothing", len(r.Output))
			}
		}
	})
}

// FuzzObjects reads foreign objects and clone replies as the core's side does.
func FuzzObjects(f *testing.F) {
	results := func(all ...*driverv1.Object) (out []*driverv1.CloneResult) {
		for _, o := range all {
			out = append(out, &driverv1.CloneResult{Result: &driverv1.CloneResult_Object{Object: o}})
		}
		return append(out, &driverv1.CloneResult{Result: &driverv1.CloneResult_Failure{Failure: &driverv1.Failure{}}})
	}
	good := &driverv1.Object{Id: make([]byte, 16), Type: string(AES256), CheckValue: make([]byte, 8)}
	for _, m := range []*driverv1.CloneStepReply{
		{},
		{Done: true},
		{Done: true, Keys: results(good)},
		{Done: true, Keys: results(&driverv1.Object{Id: make([]byte, 16), Type: string(RSA2048), CheckValue: make([]byte, 8)})},
		{Done: true, Keys: results(&driverv1.Object{Id: []byte{1}, Type: "rot-13"})},
		{Blob: make([]byte, 100), Keys: results(good, good)},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m driverv1.CloneStepReply
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		req := CloneRequest{Role: CloneTarget, Keys: []KeyID{{}, {1}}}
		reply, err := cloneReplyOf(req, &m)
		if err != nil && ClassOf(err) != ClassMember {
			t.Errorf("error %v is not of class member", err)
		}
		if err != nil || !reply.Done {
			return
		}
		if len(reply.Keys) != len(req.Keys) {
			t.Fatalf("done, with answers for %d keys of %d", len(reply.Keys), len(req.Keys))
		}
		for i, r := range reply.Keys {
			if r.Err == nil && (r.Object == nil || r.Object.ID != req.Keys[i] || len(r.Object.CheckValue) == 0) {
				t.Errorf("done, with %+v", r.Object)
			}
		}
	})
}

// FuzzCloneRequests reads foreign requests as the driver's side does.
func FuzzCloneRequests(f *testing.F) {
	for _, m := range []*driverv1.CloneStepRequest{
		{},
		{Transfer: make([]byte, 16), Keys: [][]byte{make([]byte, 16)}, Protocol: "memory", Role: driverv1.CloneRole_CLONE_ROLE_SOURCE},
		{Transfer: make([]byte, 16), Keys: [][]byte{make([]byte, 16)}, Protocol: "memory", Role: 257, Step: 1 << 31},
		{Transfer: make([]byte, 17), Keys: [][]byte{make([]byte, 16)}, Protocol: "memory", Role: driverv1.CloneRole_CLONE_ROLE_TARGET, Blob: []byte("blob")},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var m driverv1.CloneStepRequest
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		req, err := cloneRequestOf(&m)
		switch {
		case err != nil && ClassOf(err) != ClassCaller:
			t.Errorf("error %v is not of class caller", err)
		case err == nil && (req.Role != CloneSource && req.Role != CloneTarget || req.Step < 0 || len(req.Blob) > MaxBlob || len(req.Keys) < 1 || len(req.Keys) > MaxCloneKeys):
			t.Errorf("a request outside the contract: %+v", req)
		}
	})
}
