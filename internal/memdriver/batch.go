package memdriver

import (
	"encoding/json"

	"kmsd/pluginproto"
)

// protocolName is how two memory tokens know that they understand each other.
const protocolName = "memory"

func (d *Driver) protocol() pluginproto.CloneProtocol {
	name := d.opts.CloneProtocol
	if name == "" {
		name = protocolName
	}
	return pluginproto.CloneProtocol{
		Name: name, Gives: true, Takes: true, Alone: d.opts.OneStepClones, Keys: max(1, d.opts.CloneKeys),
		BySecret: !d.opts.HiddenDomain,
	}
}

// oneStep is a step of the clone of one key.
type oneStep struct {
	transfer [16]byte
	role     pluginproto.CloneRole
	step     int
	key      pluginproto.KeyID
	blob     []byte
	prove    bool
}

// oneReply is the answer to it.
type oneReply struct {
	blob   []byte
	done   bool
	object *pluginproto.Object
}

// part is what a blob of many keys says of one of them.
type part struct {
	Blob []byte `json:"blob,omitempty"`
	Over bool   `json:"over,omitempty"` // it is on the target
	Why  string `json:"why,omitempty"`  // it goes no further
}

func (d *Driver) clone(req pluginproto.CloneRequest) (pluginproto.CloneReply, error) {
	p := d.protocol()
	steps := make([]oneStep, len(req.Keys))
	for i, id := range req.Keys {
		steps[i] = oneStep{req.Transfer, req.Role, req.Step, id, req.Blob, req.Prove}
	}
	switch {
	case req.End:
		for _, s := range steps {
			d.clones.end(s)
		}
		return pluginproto.CloneReply{}, nil
	case req.Protocol != p.Name:
		return pluginproto.CloneReply{}, cloneRefused("there is no protocol %q", req.Protocol)
	case len(req.Keys) < 1 || len(req.Keys) > p.Keys:
		return pluginproto.CloneReply{}, cloneRefused("%d keys in one transfer, at most %d are possible", len(req.Keys), p.Keys)
	case len(req.Keys) > 1:
		return d.cloneMany(steps)
	}
	one, err := d.cloneOne(steps[0])
	reply := pluginproto.CloneReply{Blob: one.blob, Done: one.done}
	if one.object != nil {
		reply.Keys = []pluginproto.CloneResult{{Object: one.object}}
	}
	return reply, err
}

// cloneMany takes a step with each key that goes on.
func (d *Driver) cloneMany(steps []oneStep) (pluginproto.CloneReply, error) {
	parts := make([]part, len(steps))
	if first := steps[0]; first.role != pluginproto.CloneSource || first.step > 0 {
		if err := json.Unmarshal(first.blob, &parts); err != nil || len(parts) != len(steps) {
			return pluginproto.CloneReply{}, cloneRefused("the blob is not one of %d keys", len(steps))
		}
	}
	reply := pluginproto.CloneReply{Done: true, Keys: make([]pluginproto.CloneResult, len(steps))}
	for i, s := range steps {
		if parts[i].Over || parts[i].Why != "" {
			reply.Keys[i] = d.result(s.key, parts[i])
			continue
		}
		s.blob = parts[i].Blob
		one, err := d.cloneOne(s)
		if pluginproto.ClassOf(err) == pluginproto.ClassMember && err != nil {
			return pluginproto.CloneReply{}, err
		}
		parts[i] = part{Blob: one.blob, Over: one.done && s.role == pluginproto.CloneTarget}
		reply.Keys[i] = pluginproto.CloneResult{Object: one.object}
		if err != nil {
			parts[i].Why = err.Error()
			reply.Keys[i] = pluginproto.CloneResult{Err: err}
		} else if !one.done {
			reply.Done = false
		}
	}
	blob, err := json.Marshal(parts)
	reply.Blob = blob
	return reply, err
}

// result is what has become of a key in an earlier step.
func (d *Driver) result(id pluginproto.KeyID, p part) pluginproto.CloneResult {
	if p.Why != "" {
		return pluginproto.CloneResult{Err: cloneRefused("%s", p.Why)}
	}
	k, ok := d.token.find(id)
	if !ok {
		return pluginproto.CloneResult{Err: absent("cloning key", id)}
	}
	o := k.object(id)
	return pluginproto.CloneResult{Object: &o}
}
