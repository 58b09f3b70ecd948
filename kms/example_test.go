package kms_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kmsd/internal/memdriver"
	"kmsd/kms"
	"kmsd/kms/api"
	"kmsd/kms/catalog/catalogtest"
	"kmsd/pluginproto"
)

// exampleConfig is a group of three tokens in memory. A real one has a catalog of
// boltcat.Open, and members with a driver, a PIN and settings.
func exampleConfig() kms.Config {
	secret := func(s string) kms.Secret {
		return func(context.Context) ([]byte, error) { return []byte(s), nil }
	}
	group := kms.GroupConfig{Domain: secret("a domain secret has 32 bytes or more")}
	for _, name := range []string{"hsm-a", "hsm-b", "hsm-c"} {
		token := memdriver.NewToken(name)
		group.Members = append(group.Members, kms.MemberConfig{
			Name: name, Driver: "memory", PIN: secret(memdriver.PIN),
			Open: func(context.Context) (pluginproto.Driver, error) {
				return memdriver.New(memdriver.Options{Token: token}), nil
			},
		})
	}
	return kms.Config{Catalog: catalogtest.NewMemory(), Groups: []kms.GroupConfig{group}}
}

// awaitAll waits until every member serves. A service has no need of that: it begins with
// those that are there.
func awaitAll(k *kms.KMS) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	events := k.Events(ctx) // before the look, so that nothing is missed in between
	if k.Status().Groups[0].State == api.GroupNormal {
		return
	}
	for e := range events {
		if e.Type == api.EventGroup && e.To == string(api.GroupNormal) {
			return
		}
	}
}

// A database keeps its data key wrapped beside its data, and re-keys without
// touching the data.
func Example() {
	ctx := context.Background()
	k, err := kms.Open(ctx, exampleConfig())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer k.Close()
	awaitAll(k)

	key, err := k.CreateMasterKey(ctx, "shop", kms.KeyOptions{})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(key.Type, "on", key.Versions[0].Copies)

	dek, err := k.DataKey(ctx, "shop", 32, []byte("table orders"))
	if err != nil {
		fmt.Println(err)
		return
	}
	version, err := k.Rotate(ctx, "shop")
	if err != nil {
		fmt.Println(err)
		return
	}
	rewrapped, err := k.Rewrap(ctx, "shop", dek.Wrapped, []byte("table orders"))
	if err != nil {
		fmt.Println(err)
		return
	}
	plaintext, err := k.Unwrap(ctx, "shop", rewrapped, []byte("table orders"))
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("version", version, "unwraps", len(plaintext), "bytes")

	_, err = k.Unwrap(ctx, "shop", rewrapped, []byte("table customers"))
	fmt.Println("another aad is corrupt:", errors.Is(err, kms.ErrCorrupt))
	// Output:
	// aes-256 on [hsm-a hsm-b hsm-c]
	// version 2 unwraps 32 bytes
	// another aad is corrupt: true
}

func ExampleKMS_Destroy() {
	ctx := context.Background()
	k, err := kms.Open(ctx, exampleConfig())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer k.Close()
	awaitAll(k)
	if _, err := k.CreateMasterKey(ctx, "shop", kms.KeyOptions{}); err != nil {
		fmt.Println(err)
		return
	}
	key, err := k.Destroy(ctx, "shop", 720*time.Hour)
	fmt.Println(key.State, err)
	_, err = k.Wrap(ctx, "shop", []byte("data key"), nil)
	fmt.Println(err)
	key, err = k.Restore(ctx, "shop")
	fmt.Println(key.State, err)
	// Output:
	// destroy_scheduled <nil>
	// key shop is scheduled for destruction
	// enabled <nil>
}

func ExampleKMS_Status() {
	k, err := kms.Open(context.Background(), exampleConfig())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer k.Close()
	awaitAll(k)
	for _, g := range k.Status().Groups {
		fmt.Println(g.Name, g.State, "primary", g.Primary)
		for _, m := range g.Members {
			fmt.Println(m.Name, m.State, m.CKR)
		}
	}
	// Output:
	// default normal primary hsm-a
	// hsm-a active CKR_OK
	// hsm-b active CKR_OK
	// hsm-c active CKR_OK
}
