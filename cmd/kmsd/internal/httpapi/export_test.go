package httpapi

import "kmsd/kms/api"

// Row is what a test may know of a route.
type Row struct{ Method, Pattern, Action string }

// Rows lists the routes that need a principal.
func Rows() []Row {
	var rows []Row
	for _, rt := range routes() {
		rows = append(rows, Row{rt.method, rt.pattern, rt.action})
	}
	return rows
}

// PublicPatterns lists the routes that need none.
func PublicPatterns() []string {
	var patterns []string
	for _, rt := range publicRoutes() {
		patterns = append(patterns, rt.pattern)
	}
	return patterns
}

// StatusOf is the HTTP status of a code.
func StatusOf(c api.Code) int { return statusOf(c) }
