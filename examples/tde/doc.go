// Package tde answers: how does a database keep its data encrypted when its
// master key lives in HSMs?
//
// It is a small table store, written to be read. Three kinds of keys are
// involved, as in every database with transparent data encryption:
//
//	master key   one per database, made in the HSMs by kmsd, never leaves them
//	table key    one per table, 32 bytes from an HSM's random source; on disk it is
//	             wrapped with the master key, in memory it is in the clear
//	page nonce   one per write of a page
//
// The life of a table in calls to kmsd, which are all in [Keys]:
//
//	Create            CreateMasterKey
//	CreateTable       DataKey         the table key, in the clear and wrapped
//	Table (open)      Unwrap
//	Insert, Get       none            AES-256-GCM with the table key, in this process
//	Rekey             Rotate, Rewrap  the wrapped table keys change, no page does
//
// So kmsd is asked when a table is made, opened or re-keyed, and not when a row is
// read or written.
//
// On disk a database is a directory:
//
//	database       which master key it has            (database.go)
//	NAME.key       header of a table: the wrapped key  (header.go)
//	NAME.pages     its rows in encrypted pages         (page.go)
//
// [FindPlaintext] searches such a directory for what should not be readable in it.
package tde
