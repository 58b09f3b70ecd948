package pluginproto

import "fmt"

// CKRName returns the name of a PKCS#11 return value, or its number when it has
// none here.
func CKRName(ckr uint) string {
	if name, ok := ckrNames[ckr]; ok {
		return name
	}
	return fmt.Sprintf("CKR_0x%08X", ckr)
}

var ckrNames = map[uint]string{ // :: return value → name; PKCS#11 2.40, pkcs11t.h
	CKROK: "CKR_OK",
}
