package pluginproto

import (
	"bytes"
	"slices"
	"time"

	driverv1 "kmsd/pluginproto/v1"
)

// keyID reads an identity off the wire.
func keyID(b []byte) (KeyID, error) {
	var id KeyID
	if len(b) != len(id) {
		return KeyID{}, Errorf(ClassCaller, "reading a key identity", "%d bytes, want %d", len(b), len(id))
	}
	copy(id[:], b)
	return id, nil
}

// commandOf reads a command off the wire. The slices are those of the message.
func commandOf(m *driverv1.Command) (Command, error) {
	op, mech, hash := m.GetOp(), m.GetMechanism(), m.GetHash()
	if uint32(op) > 0xFF || uint32(mech) > uint32(HMAC) || uint32(hash) > uint32(SHA512) {
		return Command{}, Errorf(ClassCaller, "reading a command", "operation %d, mechanism %d, hash %d: not in the contract", op, mech, hash)
	}
	cmd := Command{
		Op:        Op(op),
		Mech:      Mechanism(mech),
		Hash:      Hash(hash),
		Input:     m.GetInput(),
		IV:        m.GetIv(),
		AAD:       m.GetAad(),
		Signature: m.GetSignature(),
		Length:    int(m.GetLength()),
	}
	if cmd.Op != OpRandom && cmd.Op != OpProbe {
		id, err := keyID(m.GetKey())
		if err != nil {
			return Command{}, err
		}
		cmd.Key = id
	}
	if items := m.GetItems(); len(items) > 0 {
		cmd.Items = make([]Item, len(items))
		for i, it := range items {
			cmd.Items[i] = Item{Input: it.GetInput(), IV: it.GetIv(), AAD: it.GetAad()}
		}
	}
	return cmd, cmd.Check()
}

// mechanismsOf reads mechanisms off the wire, without those that the contract does not
// have.
func mechanismsOf(m []driverv1.Mechanism) []Mechanism {
	var out []Mechanism
	for _, mech := range m {
		if mech > driverv1.Mechanism_MECHANISM_NONE && uint32(mech) <= uint32(HMAC) && !slices.Contains(out, Mechanism(mech)) {
			out = append(out, Mechanism(mech))
		}
	}
	slices.Sort(out)
	return out
}

func wireMechanisms(m []Mechanism) []driverv1.Mechanism {
	out := make([]driverv1.Mechanism, len(m))
	for i, mech := range m {
		out[i] = driverv1.Mechanism(mech)
	}
	return out
}

// timeoutOf returns what is left until the command's deadline, false when it has
// none.
func timeoutOf(m *driverv1.Command) (time.Duration, bool) {
	const longest = 24 * time.Hour // so that a foreign number cannot overflow
	us := m.GetTimeoutUs()
	switch {
	case us == 0:
		return 0, false
	case us < 0:
		return 0, true
	case us > longest.Microseconds():
		return longest, true
	default:
		return time.Duration(us) * time.Microsecond, true
	}
}

// question is what is kept of a command to check its answer by.
type question struct {
	op     Op
	mech   Mechanism
	input  int // bytes
	length int
	iv     [GCMLongIVSize]byte
	ivSize int        // bytes of iv that there are
	items  []question // one for each item; nil: it has none
}

func questionOf(c *Command) question {
	q := question{op: c.Op, mech: c.Mech, input: len(c.Input), length: c.Length}
	q.ivSize = copy(q.iv[:], c.IV)
	if len(c.Items) > 0 {
		q.items = make([]question, len(c.Items))
		for i, it := range c.Items {
			q.items[i] = question{op: c.Op, mech: c.Mech, input: len(it.Input)}
			q.items[i].ivSize = copy(q.items[i].iv[:], it.IV)
		}
	}
	return q
}

// resultOf reads the answer to q off the wire, and refuses one that cannot be an
// answer to it.
func resultOf(q *question, m *driverv1.Result) (Result, error) {
	if f := m.GetFailure(); f != nil {
		return Result{}, errorOf(f)
	}
	if q.items != nil {
		return itemsOf(q, m)
	}
	r := Result{Output: m.GetOutput(), IV: m.GetIv()}
	if err := q.answeredBy(r.Output, r.IV); err != nil {
		return Result{}, err
	}
	return r, nil
}

// itemsOf reads the answer to a command with items.
func itemsOf(q *question, m *driverv1.Result) (Result, error) {
	answers := m.GetItems()
	if len(answers) != len(q.items) {
		return Result{}, badReply("%s %d items gave %d answers", q.op.gerund(), len(q.items), len(answers))
	}
	r := Result{Items: make([]ItemResult, len(answers))}
	for i, a := range answers {
		it := ItemResult{Output: a.GetOutput(), IV: a.GetIv()}
		if f := a.GetFailure(); f != nil {
			it = ItemResult{Err: errorOf(f)}
			if ClassOf(it.Err) != ClassCaller {
				return Result{}, badReply("%s one of many items failed for a reason that is not its own: %v", q.op.gerund(), it.Err)
			}
		} else if err := q.items[i].answeredBy(it.Output, it.IV); err != nil {
			return Result{}, err
		}
		r.Items[i] = it
	}
	if q.op == OpEncrypt {
		if err := q.fresh(r.Items); err != nil {
			return Result{}, err
		}
	}
	return r, nil
}

// answeredBy returns why an output and an IV cannot be an answer to q.
func (q *question) answeredBy(output, iv []byte) error {
	n, ok := len(output), false
	switch q.op {
	case OpEncrypt:
		ok = n == q.input+GCMTagSize && GCMIV(len(iv))
	case OpDecrypt:
		ok = q.mech == RSAOAEP && n <= maxSignature || q.mech == AESGCM && n == q.input-GCMTagSize
	case OpSign:
		ok = n > 0 && n <= maxSignature
	case OpMAC:
		ok = n == SHA256.Size()
	case OpRandom:
		ok = n == q.length
	case OpVerify, OpProbe:
		ok = n == 0
	}
	if !ok || len(iv) > GCMLongIVSize {
		return badReply("%s gave %d bytes and an IV of %d for an input of %d", q.op.gerund(), n, len(iv), q.input)
	}
	if len(iv) == 0 || bytes.Equal(iv, q.iv[:q.ivSize]) {
		return nil
	}
	switch {
	case q.op == OpDecrypt:
		return badReply("%s used another IV than the one given", q.op.gerund())
	case bytes.Equal(iv, make([]byte, len(iv))):
		return badReply("%s used an IV of zeros, which it was not given", q.op.gerund())
	}
	return nil
}

// fresh returns why the IVs of many ciphertexts cannot have been drawn at random, which
// a token that makes its own has to do.
func (q *question) fresh(items []ItemResult) error {
	used := make(map[string]bool, len(items)) // :: IV → whether an item has it
	for i, it := range items {
		own := it.Err == nil && !bytes.Equal(it.IV, q.items[i].iv[:q.items[i].ivSize])
		if own && used[string(it.IV)] {
			return badReply("%s used one IV of its own twice", q.op.gerund())
		}
		used[string(it.IV)] = true
	}
	return nil
}

// wireItems puts the answers to items on the wire.
func wireItems(items []ItemResult) []*driverv1.ItemResult {
	if len(items) == 0 {
		return nil
	}
	out := make([]*driverv1.ItemResult, len(items))
	for i, it := range items {
		if it.Err != nil {
			out[i] = &driverv1.ItemResult{Failure: failureOf(it.Err)}
		} else {
			out[i] = &driverv1.ItemResult{Output: it.Output, Iv: it.IV}
		}
	}
	return out
}

// wipeResult clears the outputs of an answer, which may be plaintext.
func wipeResult(m *driverv1.Result) {
	clear(m.GetOutput())
	for _, it := range m.GetItems() {
		clear(it.GetOutput())
	}
}

// wireObject puts an object on the wire. A label that a foreign tool has written
// may be anything; it is made presentable.
func wireObject(o Object) *driverv1.Object {
	return &driverv1.Object{
		Id:         o.ID[:],
		Type:       string(o.Type),
		Label:      text(o.Label),
		CheckValue: o.CheckValue,
		Public:     o.Public,
	}
}

// objectOf reads an object off the wire and refuses one that is incomplete.
func objectOf(m *driverv1.Object) (Object, error) {
	if m == nil {
		return Object{}, badReply("no object in it")
	}
	id, err := keyID(m.GetId())
	if err != nil {
		return Object{}, badReply("a key identity of %d bytes", len(m.GetId()))
	}
	o := Object{ID: id, Type: KeyType(m.GetType()), Label: text(m.GetLabel()), CheckValue: m.GetCheckValue(), Public: m.GetPublic()}
	switch {
	case !o.Type.known():
		return Object{}, badReply("key %s is of type %q, not in the contract", id, text(m.GetType()))
	case len(o.CheckValue) == 0 || len(o.CheckValue) > maxCheckValue:
		return Object{}, badReply("key %s has a check value of %d bytes", id, len(o.CheckValue))
	case len(o.Public) > maxPublic, o.Type.Symmetric() != (len(o.Public) == 0):
		return Object{}, badReply("key %s of type %s has a public half of %d bytes", id, o.Type, len(o.Public))
	}
	return o, nil
}

// answered reads an object that must be the one asked for.
func answered(want KeyID, m *driverv1.Object) (Object, error) {
	o, err := objectOf(m)
	if err != nil {
		return Object{}, err
	}
	if o.ID != want {
		return Object{}, badReply("asked for key %s, got %s", want, o.ID)
	}
	return o, nil
}
