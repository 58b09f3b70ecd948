package tde_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"kmsd/examples/tde"
)

func Example() {
	ctx := context.Background()
	root, err := os.MkdirTemp("", "tde-example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(root)
	dir := filepath.Join(root, "shop")

	keys := newFakeKeys() // in a program: client.New(addr, options), or kms.Open(ctx, config)
	db, err := tde.Create(ctx, keys, dir, "shop")
	if err != nil {
		log.Fatal(err)
	}
	orders, err := db.CreateTable(ctx, "orders")
	if err != nil {
		log.Fatal(err)
	}
	ids, err := orders.Insert([]byte("4711, two chairs"), []byte("4712, a table"))
	if err != nil {
		log.Fatal(err)
	}
	version, err := db.Rekey(ctx)
	if err != nil {
		log.Fatal(err)
	}
	row, err := orders.Get(ids[1])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("master key version %d, row %v: %s\n", version, ids[1], row)

	found, _, err := tde.FindPlaintext(dir, []byte("two chairs"))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("readable on disk:", len(found))
	if err := db.Close(); err != nil {
		log.Fatal(err)
	}
	// Output:
	// master key version 2, row {0 1}: 4712, a table
	// readable on disk: 0
}
