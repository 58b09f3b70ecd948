package memdriver_test

import (
	"fmt"
	"testing"

	"kmsd/internal/drivertest"
	"kmsd/internal/memdriver"
	"kmsd/pluginproto"
)

func TestContractOfATokenThatChoosesItsIVs(t *testing.T) {
	for _, size := range []int{pluginproto.GCMIVSize, pluginproto.GCMLongIVSize} {
		t.Run(fmt.Sprintf("IVs of %d bytes", size), func(t *testing.T) {
			drivertest.Run(t, drivertest.Config{
				Types: []pluginproto.KeyType{pluginproto.AES256, pluginproto.AES128},
				NewToken: func(t *testing.T) drivertest.Token {
					token := memdriver.NewToken(t.Name())
					return drivertest.Token{
						PIN: []byte(memdriver.PIN),
						Start: func(t *testing.T) pluginproto.Driver {
							d := memdriver.New(memdriver.Options{Token: token, OwnIV: size})
							return drivertest.NewWall(t, d, pluginproto.ServerOptions{}, pluginproto.ClientOptions{})
						},
					}
				},
			})
		})
	}
}
