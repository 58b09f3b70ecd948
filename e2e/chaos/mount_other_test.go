//go:build !linux

package chaos_test

import "errors"

func mount(string, string) (unmount func() error, err error) { return nil, errors.ErrUnsupported }
