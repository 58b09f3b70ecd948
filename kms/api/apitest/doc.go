// Package apitest answers: does this service keep the promises of api.Service,
// api.Admin and api.Databases?
//
// [Run], [RunAdmin], [RunDatabases] and [RunRekeys] are those promises as tests. The
// service over HSMs, the client over HTTP and [Memory] pass the same ones, so that a
// program may take any of them.
package apitest
