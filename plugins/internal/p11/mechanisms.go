package p11

import (
	"slices"

	"github.com/miekg/pkcs11"

	"kmsd/pluginproto"
)

// mechanisms are those of the contract that the token offers, as its library and its
// policies have it at this moment; nil when it does not say. A token in FIPS mode, for
// one, may offer fewer than its sisters.
func (c *conn) mechanisms(q Quirks) []pluginproto.Mechanism {
	list, err := c.lib.GetMechanismList(c.place.slot)
	if err != nil {
		return nil
	}
	oaep := uint(pkcs11.CKM_RSA_PKCS_OAEP)
	if q.RawOAEP {
		oaep = pkcs11.CKM_RSA_X_509
	}
	var offered []pluginproto.Mechanism
	for _, m := range []struct {
		mech pluginproto.Mechanism
		ckm  uint
	}{
		{pluginproto.AESGCM, pkcs11.CKM_AES_GCM},
		{pluginproto.RSAPKCS1v15, pkcs11.CKM_RSA_PKCS},
		{pluginproto.RSAPSS, pkcs11.CKM_RSA_PKCS_PSS},
		{pluginproto.RSAOAEP, oaep},
		{pluginproto.ECDSA, pkcs11.CKM_ECDSA},
		{pluginproto.HMAC, pkcs11.CKM_SHA256_HMAC},
	} {
		if slices.ContainsFunc(list, func(l *pkcs11.Mechanism) bool { return l.Mechanism == m.ckm }) {
			offered = append(offered, m.mech)
		}
	}
	return offered
}
