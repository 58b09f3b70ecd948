// Package p11 answers: how is the driver contract said in PKCS#11?
//
// [Driver] is the one PKCS#11 engine. What differs between HSMs is a [Quirks]
// value, plain data that each driver's main hands in; no other package knows what
// a session, a handle or a template is.
//
// # What comes from where
//
// crypto11 loads the library, picks the slot, keeps the token's state alive,
// makes keys and signs with pairs. The binding below it (miekg/pkcs11) does what
// crypto11 has no call for: AES-GCM, wrapping, attributes, check values, session
// objects. Both talk to one library in one process: crypto11 calls C_Initialize
// and C_Finalize, and this package opens its own sessions beside crypto11's pool.
// It also logs in itself, because crypto11 takes any PIN for a token that is
// logged in already and keeps the PIN as a string for as long as it lives.
//
// # What an HSM brings
//
// Where keys can never be extracted they go from HSM to HSM by the vendor's own protocols,
// which an [Extension] speaks. The engine is between the extensions of two drivers: the
// source describes its keys, every word travels in a frame that says where it belongs and
// is authenticated under the domain secret, and what has come is a key only when the token
// itself shows that it is the one described. A transfer has a session of its own; all of
// them run on the rare lane, whose one worker is the only one that knows of them.
//
// # Lanes
//
// Every call into the library runs on a worker of a lane, never on the caller's
// goroutine, so a context that ends frees its caller at once while the C call runs
// on. There are four lanes: fast (secret keys, random), slow (key pairs), probe,
// and rare (key management). Each worker owns one session. A probe ends only when
// no worker is late with what it does, so a library that hangs in one session cannot
// pass for a sound one by answering in another.
//
// # One lock
//
// Driver.mu is held for reading during every C call and for writing while the
// connection is made anew or closed and while objects on the token are created,
// changed or destroyed. SoftHSM 2.6.1 answers CKR_GENERAL_ERROR, loses objects or
// crashes when one thread writes an object to a token that another reads. Long
// work (a key generation) is done on session objects under the read lock, and only
// the copy to the token takes the write lock, so a probe never waits for it. A library
// that bears writing beside reading has the quirk OnToken and needs neither.
//
// # Lost sessions
//
// A return value that means "your session, login or handle is gone" makes the
// worker look whether the session is alive. If it is, only the cached handle was
// stale. If not, or if an operation is stuck in it, one worker builds the whole connection anew (library, login,
// sessions, session objects, handles) while the others wait, and the call is tried
// again. If the connection cannot be made the driver is finished and
// says so to every later call; the process is meant to be replaced.
package p11
