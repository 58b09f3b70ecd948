package httpapi

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"kmsd/kms/api"
)

// member is the one in the path.
func (c *call) member() (api.Member, error) {
	g, err := c.group(c.request.PathValue("group"))
	if err != nil {
		return api.Member{}, err
	}
	name := c.request.PathValue("member")
	for _, m := range g.Members {
		if m.Name == name {
			return m, nil
		}
	}
	return api.Member{}, api.NewError(api.CodeNotFound, "no member of group "+g.Name+" is named "+clip(name), nil)
}

// forced reads the parameter force, for the action and for the record.
func (c *call) forced() (bool, error) {
	force, err := c.params.flag("force")
	c.record.Force = force
	return force, err
}

// onMember calls do for the member in the path, if there is such a member.
func onMember[Ans any](c *call, do func(group, member string) (Ans, error)) (Ans, error) {
	if _, err := c.member(); err != nil {
		var zero Ans
		return zero, err
	}
	return do(c.request.PathValue("group"), c.request.PathValue("member"))
}

// onGroup is the same for the group in the path.
func onGroup[Ans any](c *call, do func(group string) (Ans, error)) (Ans, error) {
	name := c.request.PathValue("group")
	if _, err := c.group(name); err != nil {
		var zero Ans
		return zero, err
	}
	return do(name)
}

// Describe says in one line of text how a member was described, for the audit log. Of a
// setting that no driver has it gives the name alone: somebody may have put a PIN there.
func Describe(spec api.MemberSpec) string {
	var parts []string
	add := func(name, value string) {
		if value != "" {
			parts = append(parts, name+"="+value)
		}
	}
	add("driver", spec.Driver)
	add("sha256", spec.SHA256)
	if spec.Standby {
		add("standby", "true")
	}
	add("pin.file", spec.PIN.File)
	for _, name := range slices.Sorted(maps.Keys(spec.Settings)) {
		value := spec.Settings[name]
		switch name {
		case "module", "softhsm_conf", "token_label", "token_serial":
		default:
			value = "(not recorded)"
		}
		add("settings."+name, value)
	}
	return strings.Join(parts, " ")
}

func addMember(ctx context.Context, c *call, spec api.MemberSpec) (api.Member, error) {
	c.record.Member, c.record.Spec = clip(spec.Name), Describe(spec)
	return onGroup(c, func(group string) (api.Member, error) { return c.service.AddMember(ctx, group, spec) })
}

// removeMember answers with the group that is left.
func removeMember(ctx context.Context, c *call, _ none) (api.Group, error) {
	force, err := c.forced()
	if err != nil {
		return api.Group{}, err
	}
	return onMember(c, func(group, member string) (api.Group, error) {
		if err := c.service.RemoveMember(ctx, group, member, force); err != nil {
			return api.Group{}, err
		}
		return c.group(group)
	})
}

// replaceMember takes the name from the path. A body may repeat it.
func replaceMember(ctx context.Context, c *call, spec *api.MemberSpec) (api.Member, error) {
	if spec != nil {
		c.record.Spec = Describe(*spec)
	}
	return onMember(c, func(group, member string) (api.Member, error) {
		if spec != nil && spec.Name != "" && spec.Name != member {
			return api.Member{}, badRequest(fmt.Sprintf("the path says member %s and the body %s; a member keeps its name", member, clip(spec.Name)))
		}
		if spec != nil {
			spec.Name = member
		}
		return c.service.ReplaceMember(ctx, group, member, spec)
	})
}

func setRole(ctx context.Context, c *call, req api.RoleBody) (api.Member, error) {
	force, err := c.forced()
	if err != nil {
		return api.Member{}, err
	}
	if req.Role == api.RoleActive || req.Role == api.RoleStandby { // no other text gets into the log
		c.record.Operation = req.Role
	}
	return onMember(c, func(group, member string) (api.Member, error) {
		return c.service.SetRole(ctx, group, member, req.Role, force)
	})
}

func drainMember(ctx context.Context, c *call, _ none) (api.Member, error) {
	force, err := c.forced()
	if err != nil {
		return api.Member{}, err
	}
	return onMember(c, func(group, member string) (api.Member, error) {
		return c.service.Drain(ctx, group, member, force)
	})
}

// recoverMember answers with the member as it is after the attempt.
func recoverMember(ctx context.Context, c *call, _ none) (api.Member, error) {
	return onMember(c, func(group, member string) (api.Member, error) {
		if err := c.service.Recover(ctx, group, member); err != nil {
			return api.Member{}, err
		}
		return c.member()
	})
}

func syncGroup(ctx context.Context, c *call, opts api.SyncOptions) (api.SyncReport, error) {
	c.record.Adopt = opts.Adopt
	return onGroup(c, func(group string) (api.SyncReport, error) { return c.service.Sync(ctx, group, opts) })
}

func reinitializeGroup(ctx context.Context, c *call, _ none) (api.Group, error) {
	return onGroup(c, func(group string) (api.Group, error) { return c.service.Reinitialize(ctx, group) })
}

func checkGroup(ctx context.Context, c *call, _ none) (api.GroupCheck, error) {
	return onGroup(c, func(group string) (api.GroupCheck, error) { return c.service.Check(ctx, group) })
}
