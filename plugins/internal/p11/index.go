package p11

import (
	"bytes"
	"maps"
	"sync"
	"time"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// index is where the keys are on the token: what the last look at all of it has
// shown, and what this driver has found and changed since. It is there because a
// library may look for one object by reading them all, as SoftHSM does from files:
// 100 ms for each question to a token with 3,000 keys.
//
// It is never the last word on anybody's key. A place in it is used only while the
// token shows the key there, and that an identity is not in it is believed for a
// short while and only when a key is to be added, never when one is asked for.
type index struct {
	mu    sync.Mutex                   // guards the rest
	at    map[pluginproto.KeyID]halves // :: identity → its objects; none of them: ask the token
	until time.Time                    // when to stop believing that what is not in at is not on the token

	// there are the objects that were seen on the token, whosever they are; all of them for as
	// long as until.
	there map[pkcs11.ObjectHandle]bool
}

// A look at the whole token is believed for so many times as long as it took, which
// bounds what looking costs to a tenth of the time.
const surveyWorth = 10

// get returns what is known of an identity.
func (x *index) get(id pluginproto.KeyID) halves {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.at[id]
}

// note takes down what the token holds under an identity.
func (x *index) note(id pluginproto.KeyID, o halves) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(o.all()) == 0 {
		if _, listed := x.at[id]; listed { // it may have come since the look
			x.at[id] = halves{}
		}
		return
	}
	x.at[id] = o
	for _, h := range o.all() {
		x.there[h] = true
	}
}

// doubt takes down that the token has to be asked about an identity.
func (x *index) doubt(id pluginproto.KeyID) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.at[id] = halves{}
}

// replace takes down what a look at the whole token has shown: all its objects, and the
// keys among them.
func (x *index) replace(objects []pkcs11.ObjectHandle, keys map[pluginproto.KeyID]halves, began time.Time) {
	there := setOf(objects)
	now := time.Now()
	x.mu.Lock()
	defer x.mu.Unlock()
	x.at, x.there, x.until = keys, there, now.Add(surveyWorth*now.Sub(began))
}

func setOf(objects []pkcs11.ObjectHandle) map[pkcs11.ObjectHandle]bool {
	set := make(map[pkcs11.ObjectHandle]bool, len(objects))
	for _, h := range objects {
		set[h] = true
	}
	return set
}

// all returns the objects that are on the token, if a look at the whole of it is believed.
func (x *index) all() (there map[pkcs11.ObjectHandle]bool, complete bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.completeLocked() {
		return nil, false
	}
	return maps.Clone(x.there), true
}

// lacks reports whether the token need not be asked to know that it has nothing of an
// identity, and whether it was looked at as a whole, without which nobody can know.
func (x *index) lacks(id pluginproto.KeyID) (lacks, complete bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	_, listed := x.at[id]
	complete = x.completeLocked()
	return complete && !listed, complete
}

// destroyed takes down that an object is gone, and its handle free for another one.
func (x *index) destroyed(h pkcs11.ObjectHandle) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.there, h)
}

// forget empties the index.
func (x *index) forget() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.at, x.there, x.until = map[pluginproto.KeyID]halves{}, map[pkcs11.ObjectHandle]bool{}, time.Time{}
}

func (x *index) completeLocked() bool { return time.Now().Before(x.until) }

// The functions below call into the library: their callers hold the driver's lock.

// survey looks at the whole token and returns the objects of every identity.
func (s *session) survey() (map[pluginproto.KeyID]halves, error) {
	began := time.Now()
	handles, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
	if err != nil {
		return nil, err
	}
	all := make(map[pluginproto.KeyID]halves, len(handles))
	for _, h := range handles {
		s.job.expect(shortStep)
		v, err := s.attributes(h, pkcs11.CKA_CLASS, pkcs11.CKA_ID)
		if ckr, _ := ckrOf(err); ckr == pkcs11.CKR_ATTRIBUTE_TYPE_INVALID {
			continue // a data object, say, which has no CKA_ID
		}
		if err != nil {
			return nil, err
		}
		if id, ours := idOf(v[1]); ours {
			o := all[id]
			if o.add(ulong(v[0]), h) {
				all[id] = o
			}
		}
	}
	// The index gets a map of its own: this one is the caller's.
	s.c.index.replace(handles, maps.Clone(all), began)
	return all, nil
}

// known returns a whole key where the index has it, if the token shows it there.
func (s *session) known(id pluginproto.KeyID) (halves, bool) {
	o := s.c.index.get(id)
	if !o.whole() {
		return halves{}, false
	}
	for _, h := range o.all() {
		if !s.shows(id, h) {
			return halves{}, false
		}
	}
	return o, true
}

// shows reports whether an object is on the token and has this identity.
func (s *session) shows(id pluginproto.KeyID, h pkcs11.ObjectHandle) bool {
	v, err := s.attributes(h, pkcs11.CKA_ID)
	return err == nil && bytes.Equal(v[0], id[:])
}

// knownKey is key, but for what the index knows: a second key that another program
// has put under the same identity since the last look is not seen.
func (s *session) knownKey(id pluginproto.KeyID) (halves, error) {
	if o, ok := s.known(id); ok {
		return o, nil
	}
	return s.key(id)
}

// held returns what the token holds under an identity before something is added.
func (s *session) held(id pluginproto.KeyID) (halves, error) {
	if o, ok := s.known(id); ok {
		return o, nil
	}
	lacks, complete := s.c.index.lacks(id)
	if !complete {
		if s.d.quirks.FindsByID {
			return s.gather(s.findOnce, onToken(id)...)
		}
		all, err := s.survey()
		if err != nil {
			return halves{}, err
		}
		_, listed := all[id]
		lacks = !listed
	}
	if lacks {
		return halves{}, nil
	}
	return s.objects(id)
}

// lookAround returns which objects are on the token, anybody's, to tell what comes with a
// target's next step from what was there. It takes a few calls, for nothing of them is read,
// and none where nothing is due. What others forget or find while something comes changes
// nothing about what was there before.
func (s *session) lookAround(t *transfer) (map[pkcs11.ObjectHandle]bool, error) {
	if there, complete := s.c.index.all(); complete || !t.target.Due() {
		return there, nil
	}
	all, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
	return setOf(all), err
}
