package httpapi

import (
	"context"
	"time"

	"kmsd/kms/api"
)

// change makes an action that does to one version of a key, or without a version to all of
// it, what method does.
func change(action api.VersionAction, method func(Service, context.Context, string) (api.Key, error)) func(context.Context, *call, none) (api.Key, error) {
	return func(ctx context.Context, c *call, _ none) (api.Key, error) {
		version, err := c.version()
		switch {
		case err != nil:
			return api.Key{}, err
		case version == 0:
			return method(c.service, ctx, c.key())
		}
		c.record.Operation = ofVersion
		return c.service.ChangeVersion(ctx, c.key(), version, api.VersionChange{Action: action})
	}
}

// ofVersion is the operation of a record about one version of a key.
const ofVersion = "version"

// version reads the parameter version, for the action and for the record. 0: not given.
func (c *call) version() (int, error) {
	version, err := c.params.number("version", 0, maxVersion)
	c.record.Version = version
	return version, err
}

// named makes an action of a method that takes a key's name and nothing else.
func named[Ans any](method func(Service, context.Context, string) (Ans, error)) func(context.Context, *call, none) (Ans, error) {
	return func(ctx context.Context, c *call, _ none) (Ans, error) {
		return method(c.service, ctx, c.key())
	}
}

func createKey(ctx context.Context, c *call, req api.CreateBody) (api.Key, error) {
	c.record.Group, c.record.AllowDegraded = clip(req.Group), req.AllowDegraded
	return c.service.CreateMasterKey(ctx, req.Name, req.KeyOptions)
}

func listKeys(ctx context.Context, c *call, _ none) (api.KeyPage, error) {
	limit, err := c.params.number("limit", 0, api.MaxPage)
	if err != nil {
		return api.KeyPage{}, err
	}
	page, err := c.service.Keys(ctx, api.ListOptions{Prefix: c.params.text("prefix"), After: c.params.text("after"), Limit: limit})
	if err != nil {
		return api.KeyPage{}, err
	}
	allowed := make([]api.Key, 0, len(page.Keys))
	for _, k := range page.Keys {
		if c.may(c.record.Action, k.Name) {
			allowed = append(allowed, k)
		}
	}
	page.Keys = allowed
	return page, nil
}

func updateKey(ctx context.Context, c *call, req api.KeyUpdate) (api.Key, error) {
	return c.service.UpdateKey(ctx, c.key(), req)
}

func destroyKey(ctx context.Context, c *call, _ none) (api.Key, error) {
	const byDefault time.Duration = -1 // see api.Service
	window, err := c.params.duration("window", byDefault)
	if err != nil {
		return api.Key{}, err
	}
	version, err := c.version()
	switch {
	case err != nil:
		return api.Key{}, err
	case version == 0:
		return c.service.Destroy(ctx, c.key(), window)
	}
	c.record.Operation = ofVersion
	return c.service.ChangeVersion(ctx, c.key(), version, api.VersionChange{Action: api.ActionDestroy, Window: window})
}

func rotateKey(ctx context.Context, c *call, req api.RotateOptions) (api.VersionBody, error) {
	c.record.AllowDegraded = req.AllowDegraded
	v, err := c.service.RotateWith(ctx, c.key(), req)
	c.record.Version = v.Number
	return api.VersionBody{Version: v.Number, Copies: v.Copies}, err
}

func sign(ctx context.Context, c *call, req api.SignRequest) (api.Signature, error) {
	s, err := c.service.Sign(ctx, c.key(), req)
	c.record.Version = s.Version
	return s, err
}

func verifySignature(ctx context.Context, c *call, req api.VerifyRequest) (api.ValidBody, error) {
	c.record.Version = req.Version
	valid, err := c.service.VerifySignature(ctx, c.key(), req)
	return api.ValidBody{Valid: valid}, err
}

func decrypt(ctx context.Context, c *call, req api.DecryptRequest) (api.PlaintextBody, error) {
	c.record.Version = req.Version
	plaintext, err := c.service.Decrypt(ctx, c.key(), req)
	return api.PlaintextBody{Plaintext: plaintext}, err
}

func mac(ctx context.Context, c *call, req api.MACRequest) (api.MAC, error) {
	m, err := c.service.MAC(ctx, c.key(), req)
	c.record.Version = m.Version
	return m, err
}
