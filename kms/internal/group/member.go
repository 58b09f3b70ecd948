package group

import (
	"context"

	"kmsd/pluginproto"
)

// Member is one member as it is lent to a key operation: the calls of a Driver
// with the member's name on their errors. It is good for as long as the
// connection it was lent on; after that every call fails with ClassMember.
//
// A call that fails with ClassMember has taken the member out of the group
// already. A call returns at the end of its context, or when the member stops
// answering, though the token may still be at it; a later call that changes keys
// on the same member waits for the end of the earlier one, so that a Destroy
// never overtakes the Generate it undoes.
type Member interface {
	Name() string
	Token() pluginproto.TokenInfo

	List(ctx context.Context) ([]pluginproto.Object, error)
	Inspect(ctx context.Context, id pluginproto.KeyID) (pluginproto.Object, error)
	Generate(ctx context.Context, spec pluginproto.KeySpec) (pluginproto.Object, error)
	SetAttributes(ctx context.Context, id pluginproto.KeyID, attrs pluginproto.Attributes) error
	Destroy(ctx context.Context, id pluginproto.KeyID) error
	CloneStep(ctx context.Context, req pluginproto.CloneRequest) (pluginproto.CloneReply, error)
	Facts(ctx context.Context) ([]pluginproto.Fact, error)
	Do(ctx context.Context, cmd pluginproto.Command) (pluginproto.Result, error)
}
