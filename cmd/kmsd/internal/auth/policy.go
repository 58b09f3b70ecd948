package auth

import (
	"fmt"
	"slices"
	"strings"
)

// The actions that a policy can allow.
const (
	ActionCreate          = "create"
	ActionRead            = "read"
	ActionList            = "list"
	ActionUpdate          = "update"
	ActionRotate          = "rotate"
	ActionDisable         = "disable"
	ActionEnable          = "enable"
	ActionDestroy         = "destroy"
	ActionRestore         = "restore"
	ActionVerify          = "verify"
	ActionWrap            = "wrap"
	ActionUnwrap          = "unwrap"
	ActionRewrap          = "rewrap"
	ActionDataKey         = "datakey"
	ActionSign            = "sign"
	ActionVerifySignature = "verify-signature"
	ActionDecrypt         = "decrypt"
	ActionMAC             = "mac"
	ActionRandom          = "random"
	ActionGroupRead       = "group-read"
	ActionGroupAdmin      = "group-admin"
	ActionDatabaseCreate  = "database-create"
	ActionDatabaseRead    = "database-read"
	ActionDatabaseList    = "database-list"
	ActionDatabaseRekey   = "database-rekey"
	ActionNamedGet        = "named-get"    // of a data key's plaintext
	ActionNamedPut        = "named-put"    // and rotate
	ActionNamedList       = "named-list"   // and describe
	ActionNamedDelete     = "named-delete" // the newest version
	ActionBackup          = "backup"

	anyAction = "*"
)

// Actions lists every action, in the order in which documents show them.
func Actions() []string {
	return []string{
		ActionCreate, ActionRead, ActionList, ActionUpdate, ActionRotate, ActionDisable, ActionEnable, ActionDestroy,
		ActionRestore, ActionVerify, ActionWrap, ActionUnwrap, ActionRewrap, ActionDataKey, ActionSign,
		ActionVerifySignature, ActionDecrypt, ActionMAC, ActionRandom, ActionGroupRead, ActionGroupAdmin,
		ActionDatabaseCreate, ActionDatabaseRead, ActionDatabaseList, ActionDatabaseRekey,
		ActionNamedGet, ActionNamedPut, ActionNamedList, ActionNamedDelete, ActionBackup,
	}
}

func isAction(action string) bool { return slices.Contains(Actions(), action) }

// hasKey says whether an action is about a key, or a database, whose name counts as one.
func hasKey(action string) bool {
	switch action {
	case ActionRandom, ActionGroupRead, ActionGroupAdmin, ActionBackup:
		return false
	default:
		return true
	}
}

// rule allows actions on keys.
type rule struct {
	actions []string
	keys    []string // globs; none: only what has no key
}

func (r rule) allows(action, key string) bool {
	return (slices.Contains(r.actions, action) || slices.Contains(r.actions, anyAction)) && r.covers(key)
}

func (r rule) covers(key string) bool {
	if len(r.keys) == 0 {
		return key == ""
	}
	return slices.ContainsFunc(r.keys, func(glob string) bool { return match(glob, key) })
}

// fault says in what way a rule can never allow what it names, "" if it can.
func (r rule) fault() string {
	for _, a := range r.actions {
		switch {
		case len(r.keys) == 0 && (a == anyAction || hasKey(a)):
			return fmt.Sprintf("action %q needs keys: a list of globs, [\"*\"] for all", a)
		case a != anyAction && !hasKey(a) && !r.covers(""):
			return fmt.Sprintf("action %q has no key; put it in a rule of its own, without keys", a)
		}
	}
	return ""
}

// match says whether a glob matches the whole name. It takes at most the product of
// both lengths.
func match(glob, name string) bool {
	star, from := -1, 0 // the last * in glob, and where in name it was tried
	g, n := 0, 0
	for n < len(name) {
		switch {
		case g < len(glob) && glob[g] == '*':
			star, from = g, n
			g++
		case g < len(glob) && (glob[g] == '?' || glob[g] == name[n]):
			g++
			n++
		case star >= 0: // let the * take one character more
			from++
			g, n = star+1, from
		default:
			return false
		}
	}
	return strings.Trim(glob[g:], "*") == ""
}

// globFault says why a glob matches no key that could exist, "" if it may.
func globFault(glob string) string {
	const special = "._-/*?"
	for _, c := range glob {
		if !isLetterOrDigit(c) && !strings.ContainsRune(special, c) {
			return fmt.Sprintf("%q is in no key name; a glob has letters, digits, . _ - / and * and ?", c)
		}
	}
	if glob == "" || len(glob) > maxText {
		return fmt.Sprintf("a glob has 1 to %d characters", maxText)
	}
	return ""
}

func isLetterOrDigit(c rune) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}
