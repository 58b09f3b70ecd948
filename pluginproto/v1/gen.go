// Package driverv1 is the generated code of driver.proto: version 1 of the driver
// contract on the wire. Package pluginproto is the only one that uses it.
package driverv1

//go:generate ./generate
