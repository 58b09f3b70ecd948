package pluginproto

// Limits on what crosses the wall, in bytes unless said otherwise. Both ends keep
// them: neither the core nor a driver trusts the other with its memory.
const (
	// MaxInput is the longest input of one command.
	MaxInput = 1 << 20
	// MaxAAD is the longest additional authenticated data of one command: 64 KiB of a
	// caller's, and what kmsd puts before them.
	MaxAAD = 65 << 10
	// MaxItems is how many items one command may have.
	MaxItems = 256
	// MaxRandom is the most that one OpRandom gives.
	MaxRandom = 64 << 10
	// MaxLabel is the longest label of a key.
	MaxLabel = 1 << 10
	// MaxBlob is the longest blob that one end of a clone gives to the other.
	MaxBlob = 1 << 20
	// MaxCloneKeys is how many keys one transfer may carry.
	MaxCloneKeys = 64

	// GCMIVSize is the size of every IV that a token is asked to encrypt with. One that
	// makes its IVs itself may use GCMLongIVSize as well: a Luna in FIPS mode does
	// (Thales, CKM_AES_GCM), so every token has to decrypt with either.
	GCMIVSize     = 12
	GCMLongIVSize = 16
	// GCMTagSize is the only size of a tag.
	GCMTagSize = 16

	maxSignature  = 1 << 10 // RSA-4096 has 512 bytes, ECDSA P-521 132
	maxPublic     = 4 << 10 // RSA-4096 has 550 bytes
	maxCheckValue = 64
	maxText       = 1 << 10 // an error text, a field of TokenInfo
	maxSecret     = 4 << 10 // a PIN, a domain secret
	maxSettings   = 64      // settings of a member
	maxSetting    = 4 << 10 // one setting's name or value
	maxObjects    = 1 << 20 // keys on one token
	maxFacts      = 64
	maxProtocols  = 16
	maxProtocol   = 32 // a protocol's name

	// maxMessage is the longest gRPC message, both ways. A batch is closed at
	// maxBatch, and the last command in it may add MaxInput + MaxAAD.
	maxMessage = 4 << 20
	maxBatch   = 1 << 20

	// maxQueued commands and maxQueuedBytes of their input wait in a driver; past
	// either the answer is ClassBusy.
	maxQueued      = 16 << 10
	maxQueuedBytes = 64 << 20
)

// Check says whether the command is one that the contract knows, within its
// limits. Both ends of the wall ask it, and a driver may rely on it.
func (c Command) Check() error {
	if len(c.Items) > 0 {
		return c.checkItems()
	}
	if err := c.checkSizes(); err != nil {
		return err
	}
	switch c.Op {
	case OpEncrypt, OpDecrypt:
		return c.checkCipher()
	case OpSign, OpVerify:
		return c.checkSignature()
	case OpMAC:
		if c.Mech != HMAC {
			return c.mismatch()
		}
	case OpRandom:
		if c.Mech != NoMechanism {
			return c.mismatch()
		}
		if c.Length < 1 || c.Length > MaxRandom {
			return Errorf(ClassCaller, c.Op.gerund(), "%d bytes asked for, between 1 and %d are possible", c.Length, MaxRandom)
		}
	case OpProbe:
		if c.Mech != NoMechanism {
			return c.mismatch()
		}
	default:
		return Errorf(ClassCaller, c.Op.gerund(), "operation %d is not in the contract", c.Op)
	}
	return nil
}

// checkItems checks the items, each of which has to be a command that is sound.
func (c Command) checkItems() error {
	op := c.Op.gerund()
	switch {
	case c.Mech != AESGCM || c.Op != OpEncrypt && c.Op != OpDecrypt:
		return Errorf(ClassCaller, op, "only AES-GCM takes many items")
	case len(c.Items) > MaxItems:
		return Errorf(ClassCaller, op, "%d items, at most %d are possible", len(c.Items), MaxItems)
	case len(c.Input)+len(c.IV)+len(c.AAD)+len(c.Signature) > 0:
		return Errorf(ClassCaller, op, "an input beside the items")
	}
	input, aad := 0, 0
	for _, it := range c.Items {
		input, aad = input+len(it.Input), aad+len(it.AAD)
		one := Command{Op: c.Op, Mech: c.Mech, Input: it.Input, IV: it.IV, AAD: it.AAD}
		if err := one.Check(); err != nil {
			return err
		}
	}
	if input > MaxInput || aad > MaxAAD {
		return Errorf(ClassCaller, op, "items of %d bytes with %d of additional data, at most %d and %d are possible", input, aad, MaxInput, MaxAAD)
	}
	return nil
}

func (c Command) checkSizes() error {
	for _, f := range []struct {
		name string
		have int
		most int
	}{
		{"input", len(c.Input), MaxInput},
		{"additional data", len(c.AAD), MaxAAD},
		{"IV", len(c.IV), GCMLongIVSize},
		{"signature", len(c.Signature), maxSignature},
	} {
		if f.have > f.most {
			return Errorf(ClassCaller, c.Op.gerund(), "%s of %d bytes, at most %d are possible", f.name, f.have, f.most)
		}
	}
	return nil
}

func (c Command) checkCipher() error {
	switch {
	case c.Mech == RSAOAEP && c.Op == OpDecrypt:
		if c.Hash.Size() == 0 {
			return Errorf(ClassCaller, c.Op.gerund(), "OAEP needs a hash")
		}
		return nil
	case c.Mech != AESGCM:
		return c.mismatch()
	case c.Op == OpEncrypt && len(c.IV) != GCMIVSize:
		return Errorf(ClassCaller, c.Op.gerund(), "IV of %d bytes, AES-GCM takes %d", len(c.IV), GCMIVSize)
	case !GCMIV(len(c.IV)):
		return Errorf(ClassCaller, c.Op.gerund(), "IV of %d bytes, AES-GCM takes %d or %d", len(c.IV), GCMIVSize, GCMLongIVSize)
	case c.Op == OpDecrypt && len(c.Input) < GCMTagSize:
		return &Error{
			Class: ClassCaller, CKR: CKREncryptedDataInvalid, Op: c.Op.gerund(),
			Msg: "the ciphertext is shorter than its tag",
		}
	}
	return nil
}

// GCMIV reports whether an IV of n bytes may be used with AES-GCM.
func GCMIV(n int) bool { return n == GCMIVSize || n == GCMLongIVSize }

func (c Command) checkSignature() error {
	switch c.Mech {
	case HMAC:
		if c.Op == OpSign {
			return c.mismatch()
		}
		return nil
	case RSAPKCS1v15, RSAPSS, ECDSA:
	default:
		return c.mismatch()
	}
	if size := c.Hash.Size(); size == 0 || len(c.Input) != size {
		return Errorf(ClassCaller, c.Op.gerund(), "a digest of %d bytes does not fit the hash", len(c.Input))
	}
	return nil
}

func (c Command) mismatch() error {
	return Errorf(ClassCaller, c.Op.gerund(), "mechanism %d does not go with it", c.Mech)
}

// Size returns the length of the digest in bytes, 0 for a hash not in the set.
func (h Hash) Size() int {
	switch h {
	case SHA256:
		return 32
	case SHA384:
		return 48
	case SHA512:
		return 64
	default:
		return 0
	}
}

func (o Op) gerund() string {
	switch o {
	case OpEncrypt:
		return "encrypting"
	case OpDecrypt:
		return "decrypting"
	case OpSign:
		return "signing"
	case OpVerify:
		return "verifying a signature"
	case OpMAC:
		return "computing a MAC"
	case OpRandom:
		return "drawing random bytes"
	case OpProbe:
		return "probing the token"
	default:
		return "running a command"
	}
}

// known reports whether the type is one of the closed set.
func (t KeyType) known() bool {
	switch t {
	case AES128, AES256, RSA2048, RSA3072, RSA4096, ECP256, ECP384, ECP521, HMACSHA256:
		return true
	default:
		return false
	}
}
