package auth

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// localPrefix begins the names of local principals, which no file may use.
const localPrefix = "local:"

// load reads both files and returns all their faults together.
func load(cfg Config) (*state, error) {
	policies, policyFaults := loadPolicies(cfg.Policies)
	// A policy with a fault has its name all the same; a file that could not be read at
	// all has none.
	s, tokenFaults := loadPrincipals(cfg.Tokens, policies, len(policyFaults) == 0 || len(policies) > 0)
	if faults := slices.Concat(policyFaults, tokenFaults); len(faults) > 0 {
		return nil, faults
	}
	return s, nil
}

// loadPolicies returns the policies by name. Who can write that file can do
// everything; to read it does no harm.
func loadPolicies(path string) (map[string][]rule, Faults) {
	policies := make(map[string][]rule)
	if path == "" {
		return policies, nil
	}
	d := &document{path: path}
	root := d.open(0o002, "everybody may write it")
	if root == nil {
		return policies, d.sorted()
	}
	lines := make(map[string]int) // :: policy → its line
	d.fields(root, "the file", map[string]func(key, value *yaml.Node){
		"policies": func(_, value *yaml.Node) {
			d.eachField(value, "policies", func(key, value *yaml.Node) {
				name := d.name(key, "a policy's name")
				if lines[name] != 0 {
					d.add(key.Line, "policy %q is there already in line %d", name, lines[name])
				}
				lines[name] = key.Line
				policies[name] = []rule{}
				d.each(value, "policy "+name, func(n *yaml.Node) {
					policies[name] = append(policies[name], d.rule(n))
				})
			})
		},
	})
	return policies, d.sorted()
}

func (d *document) rule(n *yaml.Node) rule {
	var r rule
	sound := true
	d.fields(n, "a rule", map[string]func(key, value *yaml.Node){
		"actions": func(_, value *yaml.Node) {
			d.texts(value, "actions", func(action string, at *yaml.Node) {
				if action != anyAction && !isAction(action) {
					d.add(at.Line, "unknown action %q; there are %s and *", action, strings.Join(Actions(), ", "))
					sound = false
					return
				}
				r.actions = append(r.actions, action)
			})
			sound = sound && len(r.actions) > 0
		},
		"keys": func(_, value *yaml.Node) {
			before := len(d.faults)
			d.texts(value, "keys", func(glob string, at *yaml.Node) {
				if f := globFault(glob); f != "" {
					d.add(at.Line, "glob %q: %s", glob, f)
				}
				r.keys = append(r.keys, glob)
			})
			sound = sound && len(d.faults) == before
		},
	})
	switch {
	case !sound:
	case len(r.actions) == 0:
		d.add(n.Line, "a rule needs actions")
	default:
		if f := r.fault(); f != "" {
			d.add(n.Line, "%s", f)
		}
	}
	return r
}

// principals collects what the file of principals says.
type principals struct {
	*document
	state    *state
	policies map[string][]rule
	complete bool           // policies has all that there are
	lines    map[string]int // :: name → its line
}

// loadPrincipals reads who there is. When the policies are not complete it does not
// complain that one of them is unknown.
func loadPrincipals(path string, policies map[string][]rule, complete bool) (*state, Faults) {
	s := &state{tokens: make(map[[sha256.Size]byte]*entry), entries: make(map[identity]*entry)}
	if path == "" {
		return s, nil
	}
	p := &principals{document: &document{path: path}, state: s, policies: policies, complete: complete, lines: make(map[string]int)}
	root := p.open(0o077, "nobody but its owner may read or write it")
	if root == nil {
		return s, p.sorted()
	}
	p.fields(root, "the file", map[string]func(key, value *yaml.Node){
		"tokens":       func(_, value *yaml.Node) { p.each(value, "tokens", p.token) },
		"certificates": func(_, value *yaml.Node) { p.each(value, "certificates", p.certificate) },
	})
	return s, p.sorted()
}

func (p *principals) token(n *yaml.Node) {
	e := &entry{identity: identity{kind: KindToken}}
	fields := p.common(e)
	fields["expires"] = func(_, value *yaml.Node) {
		text := p.text(value, "expires")
		t, err := time.Parse(time.RFC3339, text)
		if text != "" && err != nil {
			p.add(value.Line, "expires %q is not a time like 2027-01-01T00:00:00Z", text)
		}
		e.expires = t
	}
	if !p.entry(n, "a token", fields, e) {
		return
	}
	if !e.hasSum {
		p.add(n.Line, "a token needs sha256: the SHA-256 of the whole token")
		return
	}
	if e.sum == [sha256.Size]byte{} {
		return // it was no hash, and is reported
	}
	if other := p.state.tokens[e.sum]; other != nil {
		p.add(n.Line, "the token of %s is the token of %s", e.name, other.name)
	}
	p.state.tokens[e.sum] = e
}

func (p *principals) certificate(n *yaml.Node) {
	e := &entry{identity: identity{kind: KindCertificate}}
	fields := p.common(e)
	fields["common_name"] = func(_, value *yaml.Node) { e.commonName = p.text(value, "common_name") }
	if !p.entry(n, "a certificate", fields, e) {
		return
	}
	if !e.hasSum && e.commonName == "" {
		p.add(n.Line, "a certificate needs sha256, common_name or both")
		return
	}
	for _, other := range p.state.certificates {
		if e.hasSum && e.sum == [sha256.Size]byte{} {
			break // it was no hash, and is reported
		}
		if e.hasSum == other.hasSum && e.sum == other.sum && (e.hasSum || e.commonName == other.commonName) {
			p.add(n.Line, "the certificate of %s is the certificate of %s", e.name, other.name)
		}
	}
	p.state.certificates = append(p.state.certificates, e)
}

// common are the fields that every principal has.
func (p *principals) common(e *entry) map[string]func(key, value *yaml.Node) {
	return map[string]func(key, value *yaml.Node){
		"name": func(_, value *yaml.Node) { e.name = p.principalName(value) },
		"sha256": func(_, value *yaml.Node) {
			text := p.text(value, "sha256")
			b, err := hex.DecodeString(text)
			if text != "" && (err != nil || len(b) != len(e.sum)) {
				p.add(value.Line, "sha256 must be %d hexadecimal digits", 2*len(e.sum))
			}
			copy(e.sum[:], b)
			e.hasSum = true
		},
		"policies": func(_, value *yaml.Node) {
			p.texts(value, "policies", func(name string, at *yaml.Node) {
				rules, ok := p.policies[name]
				if !ok && p.complete {
					p.add(at.Line, "there is no policy %q", name)
				}
				e.rules = append(e.rules, rules...)
			})
			if len(value.Content) == 0 {
				p.add(value.Line, "policies is empty; this principal could do nothing")
			}
		},
	}
}

// entry reads the fields of a principal and enters it under its name.
func (p *principals) entry(n *yaml.Node, what string, fields map[string]func(key, value *yaml.Node), e *entry) bool {
	had := make(map[string]bool)
	for name, f := range fields {
		fields[name] = func(key, value *yaml.Node) {
			had[name] = true
			f(key, value)
		}
	}
	p.fields(n, what, fields)
	for _, name := range []string{"name", "policies"} {
		if n.Kind == yaml.MappingNode && !had[name] {
			p.add(n.Line, "%s needs %s", what, name)
		}
	}
	if e.name == "" {
		return false
	}
	p.state.entries[e.identity] = e
	return true
}

// principalName reads a name that no other principal of this file has.
func (p *principals) principalName(n *yaml.Node) string {
	name := p.name(n, "a name")
	switch {
	case name == "":
	case strings.HasPrefix(name, localPrefix):
		p.add(n.Line, "the name %q is for local principals", name)
	case p.lines[name] != 0:
		p.add(n.Line, "the name %q is there already in line %d", name, p.lines[name])
	default:
		p.lines[name] = n.Line
	}
	return name
}

// name reads what will stand in logs and messages.
func (d *document) name(n *yaml.Node, what string) string {
	name := d.text(n, what)
	for _, c := range name {
		if !isLetterOrDigit(c) && !strings.ContainsRune("._-@:/", c) {
			d.add(n.Line, "%s has letters, digits and . _ - @ : / but not %q", what, c)
			break
		}
	}
	return name
}
