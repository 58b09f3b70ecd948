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

	// there are the objects that were seen on the token, whosever they are. What comes to it
	// and is among them did not come.
	there map[pkcs11.ObjectHandle]bool
}

// A look at the whole token is believed for so many times as long as it took, which
// bounds what looking costs to a tenth of the time.
const surveyWorth = 10

// get returns what is known of an identity. It is listed also when all that is known
// is that the token has to be asked.
func (x *index) get(id pluginproto.KeyID) (o halves, listed bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	o, listed = x.at[id]
	return o, listed
}

// note takes down what the token holds under an identity.
func (x *index) note(id pluginproto.KeyID, o halves) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(o.all()) == 0 {
		delete(x.at, id)
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
	x.saw(objects)
	now := time.Now()
	x.mu.Lock()
	defer x.mu.Unlock()
	x.at, x.until = keys, now.Add(surveyWorth*now.Sub(began))
}

// saw takes down all objects of the token.
func (x *index) saw(objects []pkcs11.ObjectHandle) {
	there := make(map[pkcs11.ObjectHandle]bool, len(objects))
	for _, h := range objects {
		there[h] = true
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.there = there
}

// has reports whether an object was seen on the token.
func (x *index) has(h pkcs11.ObjectHandle) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.there[h]
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

func (x *index) complete() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return time.Now().Before(x.until)
}

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
	o, _ := s.c.index.get(id)
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
	if !s.c.index.complete() {
		if s.d.quirks.FindsByID {
			return s.gather(s.findOnce, onToken(id)...)
		}
		if _, err := s.survey(); err != nil {
			return halves{}, err
		}
	}
	if _, listed := s.c.index.get(id); !listed {
		return halves{}, nil
	}
	return s.objects(id)
}

// lookAround takes down which objects are on the token, anybody's, unless that was done not
// long ago. It takes a few calls, for nothing of them is read.
func (s *session) lookAround() error {
	if s.c.index.complete() {
		return nil
	}
	all, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
	if err == nil {
		s.c.index.saw(all)
	}
	return err
}
