package httpapi

import (
	"context"
	"fmt"

	"kmsd/kms/api"
)

// crypt is wrap, unwrap and rewrap, of one item or of many. One item is a batch of
// one, because only a batch tells the version that was used.
func crypt(op api.Op) func(context.Context, *call, api.ItemsBody) (api.ResultsBody, error) {
	return func(ctx context.Context, c *call, req api.ItemsBody) (api.ResultsBody, error) {
		if req.Items == nil {
			if err := fits(op, req.Item); err != nil {
				return api.ResultsBody{}, err
			}
			if len(req.Plaintext)+len(req.Wrapped) == 0 {
				return api.ResultsBody{}, badRequest(fmt.Sprintf("field %q is missing or empty", input(op)))
			}
			return c.one(ctx, op, req.Item)
		}
		if req.Plaintext != nil || req.Wrapped != nil || req.AAD != nil {
			return api.ResultsBody{}, errBothForms()
		}
		for i, item := range req.Items {
			if err := fits(op, item); err != nil {
				return api.ResultsBody{}, badRequest(fmt.Sprintf("item %d: %v", i, err))
			}
		}
		return c.many(ctx, op, req.Items)
	}
}

func dataKeys(ctx context.Context, c *call, req api.DataKeysBody) (api.ResultsBody, error) {
	if req.Items == nil {
		return c.one(ctx, api.OpDataKey, dataKeyItem(req.DataKeyBody))
	}
	if req.Bytes != 0 || req.AAD != nil || req.Plaintext != nil {
		return api.ResultsBody{}, errBothForms()
	}
	items := make([]api.Item, len(req.Items))
	for i, body := range req.Items {
		items[i] = dataKeyItem(body)
	}
	return c.many(ctx, api.OpDataKey, items)
}

func dataKeyItem(b api.DataKeyBody) api.Item {
	return api.Item{Bytes: b.Bytes, AAD: b.AAD, WrappedOnly: b.Plaintext != nil && !*b.Plaintext}
}

func errBothForms() error {
	return badRequest("the body has items and the fields of a single one; send either")
}

// input is the field that an operation works on.
func input(op api.Op) string {
	if op == api.OpWrap {
		return "plaintext"
	}
	return "wrapped"
}

// fits refuses a field that means nothing to the operation: whoever sends it has
// mixed up two routes. That a field is missing is the item's own failure.
func fits(op api.Op, item api.Item) error {
	given, other := "wrapped", item.Wrapped
	if op != api.OpWrap {
		given, other = "plaintext", item.Plaintext
	}
	if other != nil {
		return badRequest(fmt.Sprintf("%s takes field %q, not %q", op, input(op), given))
	}
	return nil
}

func (c *call) one(ctx context.Context, op api.Op, item api.Item) (api.ResultsBody, error) {
	results, err := c.batch(ctx, op, []api.Item{item})
	if err != nil {
		return api.ResultsBody{}, err
	}
	c.record.Version = results[0].Version
	if e := results[0].Error; e != nil {
		return api.ResultsBody{}, e
	}
	return api.ResultsBody{Result: results[0]}, nil
}

func (c *call) many(ctx context.Context, op api.Op, items []api.Item) (api.ResultsBody, error) {
	c.record.Items = len(items)
	switch {
	case len(items) == 0:
		return api.ResultsBody{}, badRequest("items is empty")
	case len(items) > api.MaxItems:
		return api.ResultsBody{}, api.NewError(api.CodeTooLarge, fmt.Sprintf("%d items, at most %d are allowed", len(items), api.MaxItems), nil)
	}
	results, err := c.batch(ctx, op, items)
	if err != nil {
		return api.ResultsBody{}, err
	}
	for i := range results {
		if results[i].Error != nil {
			e := errorFor(results[i].Error, c.record.RequestID)
			results[i].Error = e
			c.record.Failed++
			c.countFailed(e.Code)
		}
	}
	return api.ResultsBody{Items: results}, nil
}

// batch checks that every item has a result, so that none is taken for another's.
func (c *call) batch(ctx context.Context, op api.Op, items []api.Item) ([]api.Result, error) {
	results, err := c.service.Batch(ctx, op, c.key(), items)
	if err != nil {
		return nil, err
	}
	if len(results) != len(items) {
		return nil, fmt.Errorf("%s of %d items gave %d results", op, len(items), len(results))
	}
	return results, nil
}

// wipe overwrites the plaintext of an answer that has been encoded. What a request
// brought is not wiped: a member that has not answered yet may still read it.
func wipe(answer any) {
	switch a := answer.(type) {
	case api.ResultsBody:
		clear(a.Plaintext)
		for _, r := range a.Items {
			clear(r.Plaintext)
		}
	case api.PlaintextBody:
		clear(a.Plaintext)
	case api.RandomBody:
		clear(a.Random)
	case api.NamedKey:
		clear(a.Plaintext)
	}
}
