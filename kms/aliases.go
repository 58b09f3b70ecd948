package kms

import "kmsd/kms/api"

// The words that a user of this package needs, so that most programs import
// nothing else. They are the same types as those of package client.
type (
	Service        = api.Service
	Key            = api.Key
	Version        = api.Version
	KeyOptions     = api.KeyOptions
	KeyUpdate      = api.KeyUpdate
	KeyPage        = api.KeyPage
	ListOptions    = api.ListOptions
	State          = api.State
	Duration       = api.Duration
	Verification   = api.Verification
	Copy           = api.Copy
	DataKey        = api.DataKey
	Op             = api.Op
	Item           = api.Item
	Result         = api.Result
	SignRequest    = api.SignRequest
	Signature      = api.Signature
	VerifyRequest  = api.VerifyRequest
	DecryptRequest = api.DecryptRequest
	MACRequest     = api.MACRequest
	MAC            = api.MAC
	Status         = api.Status
	Event          = api.Event
	Readiness      = api.Readiness
	Error          = api.Error
)

// The words of who operates groups and their members.
type (
	Admin         = api.Admin
	RotateOptions = api.RotateOptions
	Group         = api.Group
	Member        = api.Member
	MemberSpec    = api.MemberSpec
	PINSource     = api.PINSource
	SyncOptions   = api.SyncOptions
	SyncReport    = api.SyncReport
	GroupCheck    = api.GroupCheck
)

// The words of databases that ask for data keys by name.
type (
	Databases       = api.Databases
	Database        = api.Database
	DatabaseOptions = api.DatabaseOptions
	DatabasePage    = api.DatabasePage
	NamedKey        = api.NamedKey
	NamedKeyPut     = api.NamedKeyPut
	NamedKeyPage    = api.NamedKeyPage
	RekeyOptions    = api.RekeyOptions
	Job             = api.Job
	VersionChange   = api.VersionChange
)

// The states of a key and of a version.
const (
	StateEnabled          = api.StateEnabled
	StateDisabled         = api.StateDisabled
	StateDestroyScheduled = api.StateDestroyScheduled
	StateDestroyed        = api.StateDestroyed
)

// The operations of Batch.
const (
	OpWrap    = api.OpWrap
	OpUnwrap  = api.OpUnwrap
	OpRewrap  = api.OpRewrap
	OpDataKey = api.OpDataKey
)

// The sentinels, for errors.Is. See package api for what each means.
var (
	ErrBadRequest         = api.ErrBadRequest
	ErrNotFound           = api.ErrNotFound
	ErrExists             = api.ErrExists
	ErrState              = api.ErrState
	ErrWrongKey           = api.ErrWrongKey
	ErrCorrupt            = api.ErrCorrupt
	ErrTooLarge           = api.ErrTooLarge
	ErrInsufficientCopies = api.ErrInsufficientCopies
	ErrGroupLost          = api.ErrGroupLost
	ErrMemberFailed       = api.ErrMemberFailed
	ErrDeadline           = api.ErrDeadline
	ErrUnavailable        = api.ErrUnavailable
	ErrInternal           = api.ErrInternal
)
