package kms

import (
	"context"
	"sync"
	"sync/atomic"

	"kmsd/kms/api"
	"kmsd/kms/internal/envelope"
)

const (
	batchWidth     = 64 // items of one batch that are under way at a time
	defaultDataKey = 32 // bytes
)

// Batch does one operation on many items.
func (k *KMS) Batch(ctx context.Context, op Op, name string, items []Item) ([]Result, error) {
	ctx, cancel := begin(ctx)
	defer cancel()
	do, err := k.itemOp(op)
	if err != nil {
		return nil, err
	}
	if len(items) == 0 {
		return nil, badRequest("the batch has no items")
	}
	if len(items) > api.MaxItems {
		return nil, tooLarge("the batch has %d items, at most %d are allowed", len(items), api.MaxItems)
	}
	key, err := k.wrapping(name)
	if err != nil {
		return nil, err
	}
	results := make([]Result, len(items))
	var next atomic.Int64 // index of the first item that nobody has taken
	work := func() {
		for i := int(next.Add(1)) - 1; i < len(items); i = int(next.Add(1)) - 1 {
			res, err := do(ctx, key, items[i])
			if err != nil {
				res = Result{Error: api.AsError(err)}
			}
			results[i] = res
		}
	}
	var helpers sync.WaitGroup
	for range min(batchWidth, len(items)) - 1 {
		helpers.Go(work)
	}
	work() // here too, so that one item needs no other goroutine
	helpers.Wait()
	refuseIVsTwice(results)
	return results, nil
}

// refuseIVsTwice takes back every envelope that has the IV of an earlier one of the batch.
// The earlier one is safe, for nobody gets to see the other.
func refuseIVsTwice(results []Result) {
	used := make(map[string]bool, len(results)) // :: IV → whether an envelope has it
	for i, res := range results {
		if res.Wrapped == nil {
			continue
		}
		e, err := envelope.Parse(res.Wrapped)
		if err == nil && used[string(e.IV)] {
			err = errIVTwice()
		}
		if err != nil {
			clear(res.Plaintext)
			results[i] = Result{Error: api.AsError(translate("wrapping an item", err))}
			continue
		}
		used[string(e.IV)] = true
	}
}

// itemOp returns what a batch does to one item.
func (k *KMS) itemOp(op Op) (func(context.Context, *key, Item) (Result, error), error) {
	switch op {
	case OpWrap:
		return func(ctx context.Context, key *key, it Item) (Result, error) {
			wrapped, version, err := k.wrap(ctx, key, it.Plaintext, it.AAD)
			return Result{Wrapped: wrapped, Version: version}, err
		}, nil
	case OpUnwrap:
		return func(ctx context.Context, key *key, it Item) (Result, error) {
			plaintext, version, err := k.unwrap(ctx, key, it.Wrapped, it.AAD)
			return Result{Plaintext: plaintext, Version: version}, err
		}, nil
	case OpRewrap:
		return func(ctx context.Context, key *key, it Item) (Result, error) {
			wrapped, version, err := k.rewrap(ctx, key, it.Wrapped, it.AAD)
			return Result{Wrapped: wrapped, Version: version}, err
		}, nil
	case OpDataKey:
		return k.dataKeyItem, nil
	default:
		return nil, badRequest("there is no batch operation %q", op)
	}
}

func (k *KMS) dataKeyItem(ctx context.Context, key *key, it Item) (Result, error) {
	n := it.Bytes
	if n == 0 {
		n = defaultDataKey
	}
	dk, err := k.dataKey(ctx, key, n, it.AAD)
	if err != nil {
		return Result{}, err
	}
	if it.WrappedOnly {
		clear(dk.Plaintext)
		dk.Plaintext = nil
	}
	return Result{Plaintext: dk.Plaintext, Wrapped: dk.Wrapped, Version: dk.Version}, nil
}
