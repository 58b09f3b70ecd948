package main

import (
	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
	"kmsd/plugins/internal/p11"
	"kmsd/plugins/luna/internal/vendor"
)

// crypto user and crypto officer, as PKCS#11's users. A partition's PKCS#11 user is its
// Crypto Officer.
const (
	cryptoOfficer uint = pkcs11.CKU_USER
	cryptoUser    uint = 0x80000001 // CKU_LIMITED_USER
)

// quirks is what Thales' documents and bindings say of a Luna. None of it was seen on one.
func quirks() p11.Quirks {
	return p11.Quirks{
		Driver: "luna",
		Modules: []string{
			"/usr/safenet/lunaclient/lib/libCryptoki2_64.so",
			"/usr/safenet/lunaclient/libs/64/libCryptoki2.so", // the minimal client
			"/usr/lunasa/lib/libCryptoki2_64.so",              // client 5
		},
		ConfDirs: map[string]p11.ConfDir{
			"chrystoki_conf": {Env: "ChrystokiConfigurationPath", File: "Chrystoki.conf"},
		},
		Users: map[string]uint{
			"":               cryptoOfficer,
			"crypto-officer": cryptoOfficer,
			"crypto-user":    cryptoUser,
		},
		// HA groups of the client's own. Keys made through one would be on members that kmsd
		// knows nothing of.
		VirtualModels: []string{"LunaVirtual"},
		Codes:         codes,
		Extend: func(module string) (p11.Extension, error) {
			lib, err := vendor.Load(module)
			if err != nil {
				return nil, err
			}
			return &extension{lib: lib}, nil
		},
		// The HSM keeps its objects apart by itself, and its policies may forbid C_CopyObject.
		OnToken: true,
		// One question, where a look at all objects is two to the HSM for each.
		FindsByID: true,

		// A command to a network HSM waits for the network most of the time, and the HSM
		// works on many at once: Thales fills one with tens of threads (luna-ha-bench). One
		// at a time would leave it idle; more sessions than these take room that other
		// clients of the partition may need.
		FastWorkers: 8,
		SlowWorkers: 4,

		// Nothing that was read says what a wrong tag is answered with. A driver has to
		// expect both: data that is said to be invalid is taken at its word, and this one is
		// told from a broken HSM by a round trip.
		GCMTagFault: pluginproto.CKRGeneralError,
	}
}
